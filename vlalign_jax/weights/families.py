"""Lists the ways to put pictures and text together, by the `model_type` of a whole model's config.

A family says which tokens a picture takes, and how transformers names its classes. Any of its
models has one of `towers` and one of `decoders`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from transformers import (
  Idefics3Config,
  InternVLConfig,
  LlavaConfig,
  LlavaNextConfig,
  SmolVLMConfig,
)

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.idefics3 import LARGEST, MarkedGrid
from vlalign_jax.data.image_processor import TILED, ImagePreprocessor
from vlalign_jax.data.internvl import ClosestGrid
from vlalign_jax.data.llava_next import Pinpoints
from vlalign_jax.data.picture_tokens import OneTile, PictureLayout
from vlalign_jax.data.tokens import vocabulary
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig

_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
_PROJECTOR = ("projector.", "multi_modal_projector.")
_STORED = (
  ("projector.newline", "image_newline"),
  _PROJECTOR,
  ("language.lm_head.", "language_model.lm_head."),
  ("language.", "language_model.model."),
)
_MODULES = (
  ("vision.", "model.vision_tower."),
  ("projector.newline", "model.image_newline"),
  ("projector.", "model.multi_modal_projector."),
  ("language.lm_head.", "lm_head."),
  ("language.", "model.language_model."),
)


@dataclasses.dataclass(frozen=True)
class Family:
  """Describes a family.

  Attributes:
    config: transformers' class of its config.
    name: the start of its other classes' names there.
    layout: (its config, ours, tokenizer, image processor, name for errors) -> the tokens that a
      picture takes; InputError if these do not go together.
    projector: (its config, config of the tower, width of the language model) -> projector.
    processor_config: our config -> content of processor_config.json.
    towers: types of vision towers.
    processor: the class of its image processor, which files that name none are read as; None: that
      of the tower.
    own_projector: the kind of projector that its class in transformers has.
    features: its config -> layer and strategy of the features, see `hf_config.vision_config`.
    stored: (start of a canonical name, start of the name in files of any version of transformers).
    modules: the same with the names of the modules of transformers 5.
    takes_mmca: whether multi-modal causal attention may be used.
  """

  config: type
  name: str
  layout: Callable[[Any, ModelConfig, Any, ImagePreprocessor, str], PictureLayout]
  projector: Callable[[Any, VisionConfig, int], ProjectorConfig]
  processor_config: Callable[[ModelConfig], dict]
  towers: tuple[str, ...] = _LLAVA_TOWERS
  processor: str | None = None
  own_projector: str = "mlp"
  features: Callable[[Any], tuple] = lambda hf: (
    hf.vision_feature_layer,
    hf.vision_feature_select_strategy,
  )
  stored: tuple[tuple[str, str], ...] = (("vision.", "vision_tower.vision_model."), *_STORED)
  modules: tuple[tuple[str, str], ...] = _MODULES
  takes_mmca: bool = True

  @property
  def architecture(self) -> str:
    """The model's class in transformers."""
    return f"{self.name}ForConditionalGeneration"

  @property
  def module(self) -> str:
    """The module of that class."""
    return self.config.__module__.replace(".configuration_", ".modeling_")


def _llava_projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  return ProjectorConfig(
    kind=getattr(hf, "projector_type", "mlp"),
    in_width=vision.feature_width,
    out_width=width,
    activation=hf.projector_hidden_act,
    use_bias=hf.multimodal_projector_bias,
    newline=hf.model_type == "llava_next",
  )


def _llava_processor(config: ModelConfig) -> dict:
  vision = config.vision
  return {
    "processor_class": f"{of(config).name}Processor",
    "image_token": IMAGE_PLACEHOLDER,
    "num_additional_image_tokens": vision.class_tokens,
    "patch_size": vision.patch_size,
    "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
  }


def _one_tile(hf, config: ModelConfig, tokenizer, images, where: str) -> PictureLayout:
  return OneTile(hf.image_token_id, config.tokens_per_image)


def _pinpoints(hf, config: ModelConfig, tokenizer, images, where: str) -> PictureLayout:
  vision, tokens = config.vision, config.tokens_per_image
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


def _internvl_projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  joined = int(1 / hf.downsample_ratio)
  return ProjectorConfig(
    kind="norm_mlp",
    in_width=vision.feature_width * joined**2,
    out_width=width,
    activation=hf.projector_hidden_act,
    joined=joined,
  )


def _internvl_processor(config: ModelConfig) -> dict:
  return {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_image}


def _closest_grid(hf, config: ModelConfig, tokenizer, images, where: str) -> PictureLayout:
  if not isinstance(hf.vision_feature_layer, int):
    raise InputError(
      f"{where}: vision_feature_layer is {hf.vision_feature_layer}; this model reads one layer"
    )
  if hf.image_seq_length != config.tokens_per_image:
    raise InputError(
      f"{where}: image_seq_length is {hf.image_seq_length}, and a tile has "
      f"{config.tokens_per_image} embeddings; correct config.json"
    )
  marks = [_added_token(tokenizer, f"{name}_image_token", where) for name in ("start", "end")]
  options = images.processor
  return ClosestGrid(
    hf.image_token_id,
    config.tokens_per_image,
    options.min_patches,
    max(1, options.max_patches),
    config.vision.image_size,
    *marks,
  )


def _added_token(tokenizer, name: str, where: str) -> int:
  """Returns the id of a token that an attribute of the tokenizer names."""
  token = getattr(tokenizer, name, None)
  if token is None or token not in tokenizer.get_added_vocab():
    raise InputError(
      f"{where}: the tokenizer has no {name}; copy tokenizer_config.json of this model again"
    )
  return tokenizer.convert_tokens_to_ids(token)


def _idefics3_projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  joined = hf.scale_factor
  in_width = vision.feature_width * joined**2
  return ProjectorConfig("joined_linear", in_width, width, use_bias=False, joined=joined)


def _idefics3_processor(config: ModelConfig) -> dict:
  name = f"{of(config).name}Processor"
  return {"processor_class": name, "image_seq_len": config.tokens_per_image}


def _marked_grid(hf, config: ModelConfig, tokenizer, images, where: str) -> PictureLayout:
  options, ids = images.processor, vocabulary(tokenizer).ids
  longest = options.size["longest_edge"] if options.do_resize else None
  tile = options.max_image_size["longest_edge"]
  if options.do_image_splitting and not longest:
    raise InputError(
      f"{where}: pictures are cut, and neither do_resize nor size.longest_edge bounds their tiles; "
      "correct preprocessor_config.json"
    )
  side = math.ceil(min(longest, LARGEST) / tile) if options.do_image_splitting else 0
  fake, whole = "<fake_token_around_image>", "<global-img>"
  missing = {fake, whole} - tokenizer.get_added_vocab().keys()
  if missing:
    raise InputError(
      f"{where}: the tokenizer has no token {', '.join(sorted(missing))}, which marks pictures; "
      "copy the tokenizer's files of this model again"
    )

  def marks(text: str) -> tuple[int, ...]:
    return tuple(ids(text))

  def place(row: int, column: int) -> tuple[int, ...]:
    return marks(f"{fake}<row_{row + 1}_col_{column + 1}>")

  return MarkedGrid(
    hf.image_token_id,
    config.tokens_per_image,
    longest=longest,
    tile=tile,
    splits=bool(options.do_image_splitting),
    places=tuple(tuple(place(row, column) for column in range(side)) for row in range(side)),
    row_end=marks("\n"),
    whole_after_grid=marks(f"\n\n{fake}{whole}"),
    whole=marks(f"{fake}{whole}"),
    end=marks(fake),
  )


def _idefics3_family(config: type, name: str) -> Family:
  modules = (
    ("vision.", "model.vision_model."),
    ("projector.", "model.connector.modality_projection."),
    ("language.lm_head.", "lm_head."),
    ("language.", "model.text_model."),
  )
  return Family(
    config,
    name,
    _marked_grid,
    _idefics3_projector,
    _idefics3_processor,
    towers=(f"{name.lower()}_vision",),
    processor=f"{name}ImageProcessor",
    own_projector="joined_linear",
    features=lambda hf: (-1, "full"),
    stored=modules,
    modules=modules,
    takes_mmca=False,
  )


_LLAVA = (_llava_projector, _llava_processor)
FAMILIES = {
  "llava": Family(LlavaConfig, "Llava", _one_tile, *_LLAVA),
  "llava_next": Family(
    LlavaNextConfig, "LlavaNext", _pinpoints, *_LLAVA, processor="LlavaNextImageProcessor"
  ),
  "internvl": Family(
    InternVLConfig,
    "InternVL",
    _closest_grid,
    _internvl_projector,
    _internvl_processor,
    towers=("internvl_vision",),
    processor="GotOcr2ImageProcessor",
    own_projector="norm_mlp",
    stored=(("vision.", "vision_tower."), *_STORED),
    takes_mmca=False,
  ),
  "idefics3": _idefics3_family(Idefics3Config, "Idefics3"),
  "smolvlm": _idefics3_family(SmolVLMConfig, "SmolVLM"),
}


def of(config: ModelConfig) -> Family:
  """Returns the family of a model."""
  return FAMILIES[config.family]


def in_transformers(config: ModelConfig) -> bool:
  """Returns whether transformers has a class for the model, and not only for its towers."""
  return config.projector.kind == of(config).own_projector and not config.mmca


def check_type(hf, where: str) -> None:
  """Raises an InputError unless a config is of one of FAMILIES."""
  if hf.model_type not in FAMILIES:
    raise InputError(
      f"{where}: a model of type {hf.model_type!r}; supported: {', '.join(FAMILIES)}; name "
      "separate towers as model.vision and model.language"
    )


def check_tower(hf, where: str) -> None:
  """Raises an InputError unless the vision tower of a whole model's config is one of its family."""
  known, kind = FAMILIES[hf.model_type].towers, hf.vision_config.model_type
  if kind not in known:
    raise InputError(
      f"{where}: a model of type {hf.model_type!r} with a vision tower of type {kind!r}; "
      f"supported: {', '.join(known)}"
    )


def layout_of(
  hf, config: ModelConfig, tokenizer, images: ImagePreprocessor, where: str
) -> PictureLayout:
  """Returns the tokens that pictures take in a model.

  Args:
    hf: transformers' config of the model.
    config: ours.
    tokenizer: of the model.
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
  return family.layout(hf, config, tokenizer, images, where)
