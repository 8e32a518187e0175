"""The families of Idefics3 and SmolVLM, which differ in names only."""

import math

from transformers import Idefics3Config, SmolVLMConfig

from vlalign_jax.data.idefics3 import LARGEST, MarkedGrid
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.tokens import vocabulary
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights.family import Family

_MODULES = (
  ("vision.", "model.vision_model."),
  ("projector.", "model.connector.modality_projection."),
  ("language.lm_head.", "lm_head."),
  ("language.", "model.text_model."),
)


def _projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  joined = hf.scale_factor
  in_width = vision.feature_width * joined**2
  return ProjectorConfig("joined_linear", in_width, width, use_bias=False, joined=joined)


def _processor_keys(config: ModelConfig) -> dict:
  return {"image_seq_len": config.tokens_per_image}


def _marked_grid(hf, config: ModelConfig, tokenizer, images, where: str) -> PictureLayout:
  options, ids = images.processor, vocabulary(tokenizer).ids
  longest = options.size["longest_edge"] if options.do_resize else None
  tile = options.max_image_size["longest_edge"]
  if options.do_image_splitting and not longest:
    raise InputError(
      f"{where}: pictures are cut, and neither do_resize nor size.longest_edge bounds their tiles; "
      "correct preprocessor_config.json"
    )
  side = math.ceil(min(longest or 0, LARGEST) / tile) if options.do_image_splitting else 0
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


def _family(config: type, name: str) -> Family:
  return Family(
    config,
    name,
    (f"{name.lower()}_vision",),
    _marked_grid,
    _projector,
    "joined_linear",
    _processor_keys,
    stored=_MODULES,
    modules=_MODULES,
    processor=f"{name}ImageProcessor",
    features=(-1, "full"),
  )


IDEFICS3 = _family(Idefics3Config, "Idefics3")
SMOLVLM = _family(SmolVLMConfig, "SmolVLM")
