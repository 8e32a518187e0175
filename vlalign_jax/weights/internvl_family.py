"""The family of InternVL."""

from transformers import InternVLConfig

from vlalign_jax.data.internvl import ClosestGrid
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import llava_family
from vlalign_jax.weights.family import Family


def _projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  joined = int(1 / hf.downsample_ratio)
  return ProjectorConfig(
    kind="norm_mlp",
    in_width=vision.feature_width * joined**2,
    out_width=width,
    activation=hf.projector_hidden_act,
    joined=joined,
  )


def _processor_keys(config: ModelConfig) -> dict:
  return {"image_seq_length": config.tokens_per_image}


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


INTERNVL = Family(
  InternVLConfig,
  "InternVL",
  ("internvl_vision",),
  _closest_grid,
  _projector,
  "norm_mlp",
  _processor_keys,
  stored=(("vision.", "vision_tower."), *llava_family.STORED),
  modules=llava_family.MODULES,
  processor="GotOcr2ImageProcessor",
)
