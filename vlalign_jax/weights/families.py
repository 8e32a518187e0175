"""Lists the ways to put pictures and text together, by the `model_type` of a whole model's config.

A family says which tokens a picture takes, and how transformers names its classes. Any of its
models has one of `towers` and one of `decoders`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig

from vlalign_jax.data.image_processor import TILED, ImagePreprocessor
from vlalign_jax.data.llava_next import Pinpoints
from vlalign_jax.data.picture_tokens import OneTile, PictureLayout
from vlalign_jax.errors import InputError
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """Describes a family.

  Attributes:
    config: transformers' class of its config.
    name: the start of its other classes' names there.
    layout: (its config, config of the tower, embeddings of a tile, image processor, name for
      errors) -> the tokens that a picture takes; InputError if these do not go together.
    processor: the class of its image processor, which files that name none are read as; None: that
      of the tower.
    newline: whether the end of a line of patches has an embedding.
  """

  config: type
  name: str
  layout: Callable[[Any, VisionConfig, int, ImagePreprocessor, str], PictureLayout]
  processor: str | None = None
  newline: bool = False

  @property
  def architecture(self) -> str:
    """The model's class in transformers."""
    return f"{self.name}ForConditionalGeneration"

  @property
  def module(self) -> str:
    """The module of that class."""
    return self.config.__module__.replace(".configuration_", ".modeling_")


def _one_tile(hf, vision: VisionConfig, tokens: int, images, where: str) -> PictureLayout:
  return OneTile(hf.image_token_id, tokens)


def _pinpoints(hf, vision: VisionConfig, tokens: int, images, where: str) -> PictureLayout:
  stated = tuple((int(height), int(width)) for height, width in hf.image_grid_pinpoints)
  processed = images.config["image_grid_pinpoints"]
  if [list(pinpoint) for pinpoint in stated] != [list(pinpoint) for pinpoint in processed]:
    raise InputError(
      f"{where}: image_grid_pinpoints is {[list(pinpoint) for pinpoint in stated]} in config.json "
      f"and {processed} in preprocessor_config.json; correct the wrong one"
    )
  side = vision.image_size
  if not stated or any(height % side or width % side for height, width in stated):
    raise InputError(
      f"{where}: image_grid_pinpoints is {[list(pinpoint) for pinpoint in stated]}; heights and "
      f"widths must be multiples of the vision tower's {side} pixels"
    )
  if tokens != vision.patches:
    raise InputError(
      f"{where}: vision_feature_select_strategy leaves {tokens} embeddings of a tile of "
      f"{vision.patches} patches, and this model lays out the grid of patches; give "
      f"{'default' if vision.class_tokens else 'full'}"
    )
  return Pinpoints(hf.image_token_id, tokens, stated, side)


FAMILIES = {
  "llava": Family(LlavaConfig, "Llava", _one_tile),
  "llava_next": Family(
    LlavaNextConfig, "LlavaNext", _pinpoints, "LlavaNextImageProcessor", newline=True
  ),
}


def of(config: ModelConfig) -> Family:
  """Returns the family of a model."""
  return FAMILIES[config.family]


def in_transformers(config: ModelConfig) -> bool:
  """Returns whether transformers has a class for the model, and not only for its towers."""
  return config.projector.kind == "mlp" and not config.mmca


def check_type(hf, where: str) -> None:
  """Raises an InputError unless a config is of one of FAMILIES."""
  if hf.model_type not in FAMILIES:
    raise InputError(
      f"{where}: a model of type {hf.model_type!r}; supported: {', '.join(FAMILIES)}; name "
      "separate towers as model.vision and model.language"
    )


def layout_of(
  hf, vision: VisionConfig, tokens: int, images: ImagePreprocessor, where: str
) -> PictureLayout:
  """Returns the tokens that pictures take in a model.

  Args:
    hf: transformers' config of the model.
    vision: its tower.
    tokens: embeddings of a tile.
    images: its image processor.
    where: name of the model in errors.

  Raises:
    InputError: the image processor is not one of this family's, or contradicts the config.
  """
  family = FAMILIES[hf.model_type]
  kind = images.config["image_processor_type"]
  if (kind in TILED or family.processor is not None) and kind != family.processor:
    raise InputError(
      f"{where}: image_processor_type {kind} of a model of type {hf.model_type!r}, whose pictures "
      f"a {family.processor or 'processor that makes one tile'} prepares; correct "
      "preprocessor_config.json"
    )
  return family.layout(hf, vision, tokens, images, where)
