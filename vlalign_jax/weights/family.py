"""Describes a family: a way to put pictures and text together, see `families`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig

Prefixes = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Family:
  """Describes a family.

  Attributes:
    config: transformers' class of its config.
    name: the start of its other classes' names there.
    towers: types of vision towers.
    layout: (its config, ours, tokenizer, image processor, name for errors) -> the tokens that a
      picture takes; InputError if these do not go together.
    projector: (its config, config of the tower, width of the language model) -> projector.
    own_projector: the kind of projector that its class in transformers has.
    processor_keys: our config -> what processor_config.json has besides the class.
    stored: (start of a canonical name, start of the name in files of any version of transformers).
    modules: the same with the names of the modules of transformers 5.
    processor: the class of its image processor, which files that name none are read as; None: that
      of the tower.
    features: layer and strategy of the features, see `hf_config.vision_config`; None: its config
      says so.
    takes_mmca: whether multi-modal causal attention may be used.
  """

  config: type
  name: str
  towers: tuple[str, ...]
  layout: Callable[[Any, ModelConfig, Any, ImagePreprocessor, str], PictureLayout]
  projector: Callable[[Any, VisionConfig, int], ProjectorConfig]
  own_projector: str
  processor_keys: Callable[[ModelConfig], dict]
  stored: Prefixes
  modules: Prefixes
  processor: str | None = None
  features: tuple[int, str] | None = None
  takes_mmca: bool = False

  @property
  def architecture(self) -> str:
    """The model's class in transformers."""
    return f"{self.name}ForConditionalGeneration"

  @property
  def module(self) -> str:
    """The module of that class."""
    return self.config.__module__.replace(".configuration_", ".modeling_")

  def features_of(self, hf) -> tuple[int | list[int], str]:
    """Returns layer and strategy of the features, by transformers' config of a model."""
    return self.features or (hf.vision_feature_layer, hf.vision_feature_select_strategy)
