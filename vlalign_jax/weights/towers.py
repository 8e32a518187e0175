"""Lists vision towers by the `model_type` of their configs, and what is particular to each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vlalign_jax.errors import InputError
from vlalign_jax.models import clip, idefics3, internvl, siglip
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
    fields: (transformers' config, name for errors) -> the fields of `config` that are particular.
    has_post_norm: whether transformers' class has a norm after the last layer that is never run.
    alone: whether the tower is published alone, so that a new model can be made of it.
  """

  config: type[VisionConfig]
  names: Callable[[VisionConfig], list[vision_names.Name]]
  architecture: str
  processor: str
  head: Callable[[VisionConfig], dict[str, tuple[int, ...]]] | None = None
  head_key: str | None = None
  fields: Callable[[Any, str], dict] = lambda hf, where: {}
  has_post_norm: bool = True
  alone: bool = True


def _internvl(hf, where: str) -> dict:
  wanted = {
    "norm_type": ("layer_norm", "rms_norm"),
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "use_mean_pooling": (True,),  # else a norm follows the last layer
  }
  for key, values in wanted.items():
    if getattr(hf, key) not in values:
      supported = " or ".join(map(str, values))
      raise InputError(f"{where}: {key} of the vision tower is {getattr(hf, key)}, not {supported}")
  return {
    "qkv_bias": hf.attention_bias,
    "query_key_norm": hf.use_qk_norm,
    "rms_norm": hf.norm_type == "rms_norm",
    "layer_scale": hf.layer_scale_init_value,
  }


def _idefics3(hf, where: str) -> dict:
  side = hf.image_size // hf.patch_size
  # transformers finds a patch's position by its place in float32, from 0 to 1.
  places = np.arange(side, dtype=np.float32) * np.float32(1 / side)
  edges = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
  found = np.searchsorted(edges, np.minimum(places, np.float32(1 - 1e-6)), side="right")
  if not np.array_equal(found, np.arange(side)):
    raise InputError(
      f"{where}: lines of {side} patches, of which transformers takes some for others by rounding; "
      "this is not supported"
    )
  return {"output_norm": True}


def _idefics3_tower(config: type[VisionConfig], name: str) -> Tower:
  return Tower(
    config,
    vision_names.siglip,
    f"{name}VisionTransformer",
    f"{name}ImageProcessor",
    fields=_idefics3,
    has_post_norm=False,
    alone=False,
  )


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
  "internvl_vision": Tower(
    internvl.VisionConfig,
    vision_names.internvl,
    "InternVLVisionModel",
    "GotOcr2ImageProcessor",
    fields=_internvl,
    has_post_norm=False,
    alone=False,
  ),
  "idefics3_vision": _idefics3_tower(idefics3.VisionConfig, "Idefics3"),
  "smolvlm_vision": _idefics3_tower(idefics3.SmolVLMVisionConfig, "SmolVLM"),
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


def check_alone(model_type: str, where: str) -> None:
  """Raises an InputError if a new model cannot be made of a tower of this type."""
  if not TOWERS[model_type].alone:
    alone = ", ".join(name for name, tower in TOWERS.items() if tower.alone)
    raise InputError(
      f"{where}: a vision tower of type {model_type!r} is a part of whole models only; name one as "
      f"model.init_from, or a tower of type {alone} as model.vision"
    )


def check_new(config: VisionConfig, where: str) -> None:
  """Raises an InputError if a new model would leave out the first patch for a class token."""
  if not config.class_tokens and not config.keep_class_token:
    raise InputError(
      f"{where}: this vision tower has no class token that vision_feature_select_strategy=default "
      "could leave out; give model.vision_feature_select_strategy=full"
    )
