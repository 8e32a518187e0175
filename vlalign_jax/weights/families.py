"""Lists the ways to put pictures and text together, by the `model_type` of a whole model's config.

A family says which tokens a picture takes, and how transformers names its classes. Any of its
models has one of `towers` and one of `decoders`.
"""

from vlalign_jax.data.image_processor import TILED, ImagePreprocessor
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import idefics3_family, internvl_family, llava_family
from vlalign_jax.weights.family import Family

FAMILIES = {
  "llava": llava_family.LLAVA,
  "llava_next": llava_family.LLAVA_NEXT,
  "internvl": internvl_family.INTERNVL,
  "idefics3": idefics3_family.IDEFICS3,
  "smolvlm": idefics3_family.SMOLVLM,
}


def of(config: ModelConfig) -> Family:
  """Returns the family of a model."""
  return FAMILIES[config.family]


def in_transformers(config: ModelConfig) -> bool:
  """Returns whether transformers has a class for the model, and not only for its towers."""
  return config.projector.kind == of(config).own_projector and not config.mmca


def processor_config(config: ModelConfig) -> dict:
  """Returns the content of processor_config.json."""
  family = of(config)
  return {"processor_class": f"{family.name}Processor"} | family.processor_keys(config)


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
