"""A new model from two towers: a CLIP and a language model, joined by a fresh projector."""

import dataclasses

from transformers import LlavaConfig

from vlalign_jax.data.images import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import PROJECTORS
from vlalign_jax.weights import hf_config, tensors
from vlalign_jax.weights.parts import (
  IMAGE_TOKEN,
  ModelSource,
  from_parts,
  load_generation,
  load_tokenizer,
)

PAD_TOKEN = "<pad>"
# Vocabulary sizes of new models are multiples of this, so that they split over devices.
VOCABULARY_MULTIPLE = 64


def open_towers(model, aspect: str) -> ModelSource:
  """Opens the towers that the `model` group of a config names.

  Args:
    model: as of `source.open_source`.
    aspect: see ImagePreprocessor.

  Raises:
    InputError: something is missing, damaged, or does not fit together.
  """
  for key in ("vision", "language"):
    if not model[key]:
      raise InputError(f"model.{key} is empty: a new model takes a CLIP and a LLaMA directory")
  if model.projector not in PROJECTORS:
    raise InputError(f"model.projector is {model.projector!r}; choose from {', '.join(PROJECTORS)}")
  vision, language = read_configs(model.vision, model.language)
  tokenizer = load_tokenizer(model.language)
  tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
  if tokenizer.pad_token_id is None:
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
  multiple = VOCABULARY_MULTIPLE
  language.vocab_size = max(language.vocab_size, -(-len(tokenizer) // multiple) * multiple)
  feature_layers = feature_layers_of(model)
  hf = LlavaConfig(
    vision_config=vision,
    text_config=language,
    image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    vision_feature_layer=feature_layers if len(feature_layers) > 1 else feature_layers[0],
    vision_feature_select_strategy=model.vision_feature_select_strategy,
    tie_word_embeddings=language.tie_word_embeddings,
    projector_type=model.projector,
  )
  images = ImagePreprocessor.from_directory(model.vision, aspect)
  where = f"{model.vision} with {model.language}"
  parts = from_parts(hf, load_generation(model.language, tokenizer), tokenizer, images, where)
  hf.image_seq_length = parts.config.tokens_per_image
  towers = [
    {name: found for name, found in tensors.find_tensors(directory).items() if name.startswith(own)}
    for directory, own in ((model.vision, "vision."), (model.language, "language."))
  ]
  return dataclasses.replace(parts, tensors=towers[0] | towers[1], fresh=("projector/",))


def read_configs(vision: str, language: str):
  """The transformers configs of two towers' directories.

  Args:
    vision: a CLIP directory, whole or its vision tower alone.
    language: a directory of a language model.

  Raises:
    InputError: there is no readable config, or it is of a type that no model is made of.
  """
  towers = hf_config.read_config(vision), hf_config.read_config(language)
  found = getattr(towers[0], "vision_config", towers[0]), towers[1]
  hf_config.check_types(found[0], vision, found[1], language)
  return found


def feature_layers_of(model) -> list[int]:
  """The layers that the config's `model.vision_feature_layer` names.

  Raises:
    InputError: it is no number, and no several of them.
  """
  try:
    return [int(layer) for layer in str(model.vision_feature_layer).split(",")]
  except ValueError:
    raise InputError(
      f"model.vision_feature_layer is {model.vision_feature_layer!r}; give a layer number such as "
      "-2, or several, comma-separated"
    ) from None
