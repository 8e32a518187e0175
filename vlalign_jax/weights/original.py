"""Checkpoints of Vision-LLM-Alignment, the PyTorch project that this one re-creates.

It saves a model as one pickle, pytorch_model.bin. Tensors are called by its modules: `vis_encoder`,
`projection`, `lang_decoder` and `lang_embed`, the embedding that it trains and reads (that inside
`lang_decoder` stays as it was); reward models hold all that below `rwtranrsformer`, and `v_head`.
The vision tower's last layer is the feature, class token included.
"""

import dataclasses
import functools
import os

import jax.numpy as jnp
import numpy as np
from absl import logging
from transformers import LlavaConfig

from vlalign_jax import json_files
from vlalign_jax.data.images import ImagePreprocessor
from vlalign_jax.errors import InputError
from vlalign_jax.weights import assemble, hf_config, original_names, original_tokenizer
from vlalign_jax.weights.parts import IMAGE_TOKEN, ModelSource, from_parts, load_generation
from vlalign_jax.weights.pickled import PickledTensor, read_pickle

WEIGHTS = "pytorch_model.bin"
# What is to be done with adapters beside the weights.
LORA = ("merged", "separate")
_RIGHT, _LEFT = ".lora_right_weight", ".lora_left_weight"


def open_original(
  directory: str, vision: str, language: str, *, lora: str | None = None, mmca: bool = False
) -> ModelSource:
  """Opens a checkpoint; `export.export_model` writes what it becomes.

  Args:
    directory: with pytorch_model.bin and, if it was saved there, the tokenizer.
    vision, language: the directories of the towers that it was made of; only their configs, the
      image processor and, if need be, the tokenizer are taken.
    lora: what the adapters beside the weights are, one of LORA: "merged" into the weights already,
      as the original's own scripts save them, or "separate", to be merged now.
    mmca: whether it has multi-modal causal attention, which only reward models' checkpoints say.

  Raises:
    InputError: something is missing or damaged, or does not fit together; or there are adapters,
      and `lora` is None.
  """
  path = os.path.join(directory, WEIGHTS)
  stored = original_names.split(read_pickle(path))
  kind = original_names.projector_of(path, stored)
  found = _tensors(path, stored, kind, lora)
  embedding = found.get("language.embed_tokens.weight")
  if embedding is None:
    raise InputError(
      f"{path}: no lang_embed.weight, which is what the model's tokens are read from"
    )
  hf = _config(vision, language, embedding.shape[0], kind)
  own = stored.get(original_names.OWN_EMBEDDING)
  tied = assemble.read_configs(vision, language)[1].tie_word_embeddings
  headless = not {"language.lm_head.weight", "score.weight"} & found.keys()
  if tied and headless and own is not None:  # under ZeRO 3 it saves what is tied once
    found["language.lm_head.weight"] = PickledTensor(path, original_names.OWN_EMBEDDING, own)
  # A reward model is saved with the config of its language model, a policy without any.
  said = json_files.read(os.path.join(directory, "config.json")) or {}
  hf.mmca = mmca or bool(said.get("enable_mmca_attention"))
  if "score.weight" in found:
    hf.architectures = [hf_config.OWN_FAMILY + hf_config.REWARD_ARCHITECTURE]
  tokenizer = original_tokenizer.load(directory, language)
  hf.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
  images = ImagePreprocessor.from_directory(vision)
  parts = from_parts(hf, load_generation(language, tokenizer), tokenizer, images, directory)
  hf.image_seq_length = parts.config.tokens_per_image
  return dataclasses.replace(parts, tensors=found, fresh=())


def dtype_of(source: ModelSource) -> np.dtype:
  """The dtype that holds all tensors of an opened checkpoint without loss."""
  return functools.reduce(jnp.promote_types, {t.dtype for t in source.tensors.values()})


def _config(vision: str, language: str, rows: int, kind: str) -> LlavaConfig:
  vision_config, language_config = assemble.read_configs(vision, language)
  language_config.vocab_size = rows
  # The embedding and the head are tensors of their own here, whatever they were before.
  language_config.tie_word_embeddings = False
  return LlavaConfig(
    vision_config=vision_config,
    text_config=language_config,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    tie_word_embeddings=False,
    projector_type=kind,
  )


def _tensors(path: str, stored: dict, kind: str, lora: str | None) -> dict[str, PickledTensor]:
  """Canonical name -> tensor."""
  adapters = [name for name in stored if name.endswith(_RIGHT)]
  if adapters and lora is None:
    raise InputError(
      f"{path}: holds adapters ({adapters[0]}, ...). The scripts of Vision-LLM-Alignment merge "
      "them into the weights before they save: say --lora=merged if one of them saved this; "
      "--lora=separate, if not, to merge them now"
    )
  found = {}
  for name, tensor in stored.items():
    ours = original_names.canonical(name, kind)
    if ours is None or name.endswith((_RIGHT, _LEFT)):
      continue
    module = name.removesuffix(".weight")
    adapter = None
    if lora == "separate" and module + _RIGHT in stored:
      if module + _LEFT not in stored:
        raise InputError(f"{path}: {module}{_RIGHT} without {module}{_LEFT}; save it again")
      adapter = stored[module + _RIGHT], stored[module + _LEFT]
    # Reward models with adapters have their decoder twice, under two names.
    if ours in found and not found[ours].tensor.equal(tensor):
      raise InputError(f"{path}: {found[ours].name} and {name} are one parameter, and differ")
    found.setdefault(ours, PickledTensor(path, name, tensor, adapter))
  if adapters:
    logging.info("%d adapters beside the weights: %s", len(adapters), lora)
  return found
