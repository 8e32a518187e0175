"""Opens a new model of two towers: of vision and of language, joined by a fresh projector."""

import dataclasses
from typing import Any

from transformers import LlavaConfig

from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.models.projector import PROJECTORS
from vlalign_jax.weights import hf_config, tensors, towers
from vlalign_jax.weights.parts import (
  IMAGE_TOKEN,
  ModelSource,
  from_parts,
  load_generation,
  load_tokenizer,
)

PAD_TOKEN = "<pad>"
# Vocabulary sizes of new models are multiples of this, so that they can be sharded.
VOCABULARY_MULTIPLE = 64


def open_towers(model, aspect: str) -> ModelSource:
  """Opens the towers that the `model` group of a config names.

  Args:
    model: see `source.open_source`.
    aspect: see ImagePreprocessor.

  Raises:
    InputError: something is missing or damaged, or the parts do not fit together.
  """
  for key in ("vision", "language"):
    if not model[key]:
      raise InputError(
        f"model.{key} is empty: a new model needs a vision tower (such as a CLIP or SigLIP "
        "directory) and a language model (such as a LLaMA directory)"
      )
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
  hf: Any = LlavaConfig(
    vision_config=vision,
    text_config=language,
    vision_feature_layer=feature_layers if len(feature_layers) > 1 else feature_layers[0],
    vision_feature_select_strategy=model.vision_feature_select_strategy,
    tie_word_embeddings=language.tie_word_embeddings,
  )
  hf.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
  hf.projector_type = model.projector
  images = ImagePreprocessor.from_directory(model.vision, aspect, towers.processor_of(vision))
  where = f"{model.vision} with {model.language}"
  parts = from_parts(hf, load_generation(model.language, tokenizer), tokenizer, images, where)
  towers.check_new(parts.config.vision, where)
  hf.image_seq_length = parts.config.tokens_per_image
  stored = {}
  for directory, prefix in ((model.vision, "vision."), (model.language, "language.")):
    part = tensors.find_tensors(directory)
    stored |= {name: tensor for name, tensor in part.items() if name.startswith(prefix)}
  return dataclasses.replace(parts, tensors=stored, fresh=("projector/",))


def read_configs(vision: str, language: str):
  """Returns the transformers configs of the two towers.

  Args:
    vision: directory of a vision tower, or of a model that also has a text tower.
    language: directory of a language model.

  Raises:
    InputError: a config is missing, unreadable or of an unsupported type.
  """
  vision_or_both, language_config = hf_config.read_config(vision), hf_config.read_config(language)
  vision_config = getattr(vision_or_both, "vision_config", vision_or_both)
  hf_config.check_types(vision_config, vision, language_config, language)
  towers.check_alone(vision_config.model_type, vision)
  return vision_config, language_config


def feature_layers_of(model) -> list[int]:
  """Returns the layers that the config's `model.vision_feature_layer` lists.

  Raises:
    InputError: it is neither a number nor a list of numbers.
  """
  try:
    return [int(layer) for layer in str(model.vision_feature_layer).split(",")]
  except ValueError:
    raise InputError(
      f"model.vision_feature_layer is {model.vision_feature_layer!r}; give a layer number such as "
      "-2, or several, comma-separated"
    ) from None
