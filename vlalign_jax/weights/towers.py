"""Lists vision towers by the `model_type` of their configs, and what is particular to each."""

import dataclasses
from collections.abc import Callable

from vlalign_jax.errors import InputError
from vlalign_jax.models import clip, siglip
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.weights import vision_names


@dataclasses.dataclass(frozen=True)
class Tower:
  """Describes a kind of vision tower.

  Attributes:
    config: the class of its config, which builds its module and says how many class tokens it has.
    names: config -> names of its parameters.
    architecture: its class in transformers.
    processor: the class of its image processor, which files that name none are read as.
    head: config -> canonical name and shape of the tensors of a head that pools the last hidden
      state; it is never run. None: there is none.
    head_key: key of transformers' config that says whether the tower has that head.
  """

  config: type[VisionConfig]
  names: Callable[[VisionConfig], list[vision_names.Name]]
  architecture: str
  processor: str
  head: Callable[[VisionConfig], dict[str, tuple[int, ...]]] | None = None
  head_key: str | None = None


TOWERS = {
  "clip_vision_model": Tower(
    clip.VisionConfig, vision_names.clip, "CLIPVisionModel", "CLIPImageProcessor"
  ),
  "siglip_vision_model": Tower(
    siglip.VisionConfig,
    vision_names.siglip,
    "SiglipVisionModel",
    "SiglipImageProcessor",
    vision_names.siglip_head,
    "vision_use_head",
  ),
}


def processor_of(vision) -> str:
  """Returns the class of the image processor of a tower, by transformers' config of the tower."""
  return TOWERS[vision.model_type].processor


def of(config: VisionConfig) -> Tower:
  """Returns the kind of tower that a config is of."""
  return next(tower for tower in TOWERS.values() if tower.config is type(config))


def head_of(config: VisionConfig, vision) -> dict[str, tuple[int, ...]]:
  """Returns canonical name -> shape of the tensors of the pooling head, if a tower has one.

  Args:
    config: of the tower.
    vision: transformers' config of it.
  """
  kind = of(config)
  if kind.head is None or kind.head_key is None or not getattr(vision, kind.head_key):
    return {}
  return kind.head(config)


def check_new(config: VisionConfig, where: str) -> None:
  """Raises an InputError if a new model would leave out the first patch for a class token."""
  if not config.class_tokens and not config.keep_class_token:
    raise InputError(
      f"{where}: this vision tower has no class token that vision_feature_select_strategy=default "
      "could leave out; give model.vision_feature_select_strategy=full"
    )
