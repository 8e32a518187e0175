"""Reads the layout of LLaVA's original repository, and converts it to that of transformers.

config.json is a language model's, with `mm_*` keys; tensors are `model.mm_projector.*` and, in some
checkpoints, `model.vision_tower.*` (see `names.canonical`). The tower's config and image processor
are always missing, and `<image>` is not in the vocabulary.
"""

import os
from typing import Any

from transformers import AutoConfig, LlavaConfig, PreTrainedTokenizerBase

from vlalign_jax import json_files
from vlalign_jax.errors import InputError
from vlalign_jax.weights import hf_config, towers

TOWER = "vision_tower"
_PROJECTOR = "mlp2x_gelu"
_LANGUAGE = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def read(directory: str) -> dict[str, Any] | None:
  """Returns the content of config.json if it is in this layout, else None."""
  config = json_files.read(os.path.join(directory, "config.json"))
  if config is None:
    return None
  named = any(name in _LANGUAGE for name in config.get("architectures") or ())
  return config if named or "mm_projector_type" in config else None


def tower_of(directory: str, config: dict[str, Any]) -> str:
  """Returns the directory of the model's CLIP.

  Raises:
    InputError: it is not on this machine.
  """
  named = config.get("mm_vision_tower") or ""
  for path in (os.path.join(directory, TOWER), named, os.path.join(directory, named)):
    exists = path.strip("/") and os.path.isfile(os.path.join(path, "config.json"))
    if exists and os.path.realpath(path) != os.path.realpath(directory):
      return path
  raise InputError(
    f"{directory}/config.json: mm_vision_tower {named!r} is not a directory here; put that CLIP "
    f"model into {directory}/{TOWER}, or name its directory under mm_vision_tower"
  )


def aspect_of(config: dict[str, Any], aspect: str) -> str:
  """Returns how pictures are made square, "crop" or "pad"; "auto" is what the config says."""
  if aspect != "auto":
    return aspect
  return "pad" if config.get("image_aspect_ratio") == "pad" else "crop"


def convert(
  config: dict[str, Any], tower: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> LlavaConfig:
  """Returns transformers' config of the model; the tokenizer must already have `<image>`.

  Raises:
    InputError: its projector, features or picture format are not supported.
  """
  expected = {
    "mm_projector_type": (_PROJECTOR,),
    "mm_vision_select_feature": (None, *_STRATEGIES),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
  }
  for key, values in expected.items():
    if config.get(key) not in values:
      known = ", ".join(str(value) for value in values if value is not None)
      raise InputError(f"{where}/config.json: {key} is {config.get(key)!r}; supported: {known}")
  names = [_LANGUAGE[name] for name in config.get("architectures") or () if name in _LANGUAGE]
  other = ("mm_", "tune_", "freeze_", "use_mm", "image_", "model_type", "architectures")
  text = {key: value for key, value in config.items() if not key.startswith(other)}
  language = AutoConfig.for_model(names[0] if names else "llama", **text)
  language.vocab_size = max(language.vocab_size, -(-len(tokenizer) // 64) * 64)
  vision = hf_config.read_config(tower)
  vision = getattr(vision, "vision_config", vision)
  hf_config.check_types(vision, tower, language, where)
  if not towers.TOWERS[vision.model_type].config.class_tokens:
    raise InputError(
      f"{where}: a vision tower of type {vision.model_type!r}, and in the layout of LLaVA's "
      "repository only CLIP is supported: other towers' features are not named there as in "
      "transformers; convert it to transformers' layout, or train a new model of its towers"
    )
  features = config.get("mm_vision_select_feature") or "patch"
  options: Any = {
    "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    "vision_feature_select_strategy": _STRATEGIES[features],
  }
  return LlavaConfig(
    vision_config=vision,
    text_config=language,
    **options,
    vision_feature_layer=config.get("mm_vision_select_layer", -2),
    projector_hidden_act="gelu",
    tie_word_embeddings=language.tie_word_embeddings,
  )
