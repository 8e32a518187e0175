"""The families of LLaVA and of LLaVA-NeXT."""

from transformers import LlavaConfig, LlavaNextConfig

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.llava_next import Pinpoints
from vlalign_jax.data.picture_tokens import OneTile, PictureLayout
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import ProjectorConfig
from vlalign_jax.models.vit import VisionConfig
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights.family import Family

# As the first versions of transformers wrote them, without the vision tower.
STORED = (
  ("projector.newline", "image_newline"),
  ("projector.", "multi_modal_projector."),
  ("language.lm_head.", "language_model.lm_head."),
  ("language.", "language_model.model."),
)
MODULES = (
  ("vision.", "model.vision_tower."),
  ("projector.newline", "model.image_newline"),
  ("projector.", "model.multi_modal_projector."),
  ("language.lm_head.", "lm_head."),
  ("language.", "model.language_model."),
)


def _projector(hf, vision: VisionConfig, width: int) -> ProjectorConfig:
  return ProjectorConfig(
    kind=getattr(hf, "projector_type", "mlp"),
    in_width=vision.feature_width,
    out_width=width,
    activation=hf.projector_hidden_act,
    use_bias=hf.multimodal_projector_bias,
    newline=hf.model_type == "llava_next",
  )


def _processor_keys(config: ModelConfig) -> dict:
  vision = config.vision
  return {
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


def _family(config: type, name: str, layout, processor: str | None = None) -> Family:
  return Family(
    config,
    name,
    ("clip_vision_model", "siglip_vision_model"),
    layout,
    _projector,
    "mlp",
    _processor_keys,
    stored=(("vision.", "vision_tower.vision_model."), *STORED),
    modules=MODULES,
    processor=processor,
    takes_mmca=True,
  )


LLAVA = _family(LlavaConfig, "Llava", _one_tile)
LLAVA_NEXT = _family(LlavaNextConfig, "LlavaNext", _pinpoints, "LlavaNextImageProcessor")
