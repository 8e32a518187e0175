"""Opens checkpoints of Vision-LLM-Alignment, the PyTorch project that this one re-creates.

It saves a model as one pickle, pytorch_model.bin. Tensors are named after its modules:
`vis_encoder`, `projection`, `lang_decoder` and `lang_embed`, the embedding that it trains and reads
(the one inside `lang_decoder` is not trained). In reward models all names start with
`rwtranrsformer.`, except `v_head`. The features are the vision tower's last layer, with the class
token.
"""

import dataclasses
import functools
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from transformers import LlavaConfig

from vlalign_jax import json_files
from vlalign_jax.data.image_processor import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.weights import assemble, hf_config, original_names, original_tokenizer, towers
from vlalign_jax.weights.parts import IMAGE_TOKEN, ModelSource, from_parts, load_generation
from vlalign_jax.weights.pickled import PickledTensor, read_pickle

WEIGHTS = "pytorch_model.bin"
LORA = ("merged", "separate")  # see `open_original`
_RIGHT, _LEFT = ".lora_right_weight", ".lora_left_weight"


def open_original(
  directory: str, vision: str, language: str, *, lora: str | None = None, mmca: bool = False
) -> ModelSource:
  """Opens a checkpoint as a model; reads no weights.

  Args:
    directory: has pytorch_model.bin, and the tokenizer if it was saved.
    vision, language: the directories of the towers that the model was made of; only their configs,
      the image processor and, if the checkpoint has none, the tokenizer are read.
    lora: what the adapters in the file are, one of LORA: "merged" into the weights already, as the
      scripts of Vision-LLM-Alignment save them, or "separate" from them, to be merged now.
    mmca: whether it has multi-modal causal attention; only checkpoints of reward models say so.

  Raises:
    InputError: something is missing or damaged, or the parts do not fit together; or there are
      adapters, and `lora` is None.
  """
  path = os.path.join(directory, WEIGHTS)
  stored = original_names.split(read_pickle(path))
  kind = original_names.projector_of(path, stored)
  tensors = _tensors(path, stored, kind, lora)
  embedding = tensors.get("language.embed_tokens.weight")
  if embedding is None:
    raise InputError(f"{path}: no lang_embed.weight, the embedding of the model's tokens")
  hf: Any = _config(vision, language, embedding.shape[0], kind)
  unused = stored.get(original_names.UNUSED_EMBEDDING)
  tied = assemble.read_configs(vision, language)[1].tie_word_embeddings
  headless = not {"language.lm_head.weight", "score.weight"} & tensors.keys()
  if tied and headless and unused is not None:  # under ZeRO 3 tied tensors are saved once
    head = PickledTensor(path, original_names.UNUSED_EMBEDDING, unused)
    tensors["language.lm_head.weight"] = head
  # A reward model is saved with the config of its language model, a policy without a config.
  saved = json_files.read(os.path.join(directory, "config.json")) or {}
  hf.mmca = mmca or bool(saved.get("enable_mmca_attention"))
  if "score.weight" in tensors:
    hf.architectures = [hf_config.OWN_FAMILY + hf_config.REWARD_ARCHITECTURE]
  tokenizer = original_tokenizer.load(directory, language)
  hf.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
  images = ImagePreprocessor.from_directory(vision, kind=towers.processor_of(hf.vision_config))
  parts = from_parts(hf, load_generation(language, tokenizer), tokenizer, images, directory)
  hf.image_seq_length = parts.config.tokens_per_image
  return dataclasses.replace(parts, tensors=tensors, fresh=())


def dtype_of(source: ModelSource) -> np.dtype:
  """Returns the dtype that represents all tensors of an opened checkpoint without loss."""
  return functools.reduce(jnp.promote_types, {t.dtype for t in source.tensors.values()})


def _config(vision: str, language: str, vocab_size: int, kind: str) -> LlavaConfig:
  vision_config, language_config = assemble.read_configs(vision, language)
  language_config.vocab_size = vocab_size
  # The checkpoint has an embedding and a separate head, even if the language model tied them.
  language_config.tie_word_embeddings = False
  hf: Any = LlavaConfig(
    vision_config=vision_config,
    text_config=language_config,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    tie_word_embeddings=False,
  )
  hf.projector_type = kind
  return hf


def _tensors(path: str, stored: dict, kind: str, lora: str | None) -> dict[str, PickledTensor]:
  """Returns canonical name -> tensor."""
  adapters = [name for name in stored if name.endswith(_RIGHT)]
  if adapters and lora is None:
    raise InputError(
      f"{path} has adapters ({adapters[0]}, ...). The scripts of Vision-LLM-Alignment merge them "
      "into the weights before they save: add --lora=merged if one of them saved this; otherwise "
      "add --lora=separate to merge them now"
    )
  tensors = {}
  for name, tensor in stored.items():
    canonical = original_names.canonical(name, kind)
    if canonical is None or name.endswith((_RIGHT, _LEFT)):
      continue
    module = name.removesuffix(".weight")
    adapter = None
    if lora == "separate" and module + _RIGHT in stored:
      if module + _LEFT not in stored:
        raise InputError(f"{path}: {module}{_RIGHT} without {module}{_LEFT}; save it again")
      adapter = stored[module + _RIGHT], stored[module + _LEFT]
    # Reward models with adapters have their decoder twice, under two names.
    if canonical in tensors and not tensors[canonical].tensor.equal(tensor):
      raise InputError(
        f"{path}: {tensors[canonical].name} and {name} are the same parameter, but differ"
      )
    tensors.setdefault(canonical, PickledTensor(path, name, tensor, adapter))
  if adapters:
    logging.info("%d adapters, %s", len(adapters), lora)
  return tensors
