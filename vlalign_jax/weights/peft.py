"""Reads PEFT directories: adapter_config.json and adapter_model.safetensors.

Tensors are named after the modules of transformers 5's class of the model, with PEFT's
prefix `base_model.model.`. Parameters that were fully trained with the adapters are in the same
file, like PEFT's `modules_to_save`; a reward model's head is the module `score`.

If transformers has no class for the model (see `weights.export`), the adapters of each tower are a
PEFT directory for that tower, `vision/` and `language/`, and a trained projector is in
`projector.safetensors` next to these.
"""

import json
import os
import re
from typing import Any

from vlalign_jax import json_files
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import families, hf_config, names, tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of adapter_config.json that plain LoRA may have; others change what adapters compute.
_PLAIN = {
  *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
  *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
  *("layers_to_transform", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
  *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
  *("revision", "target_modules", "task_type", "use_rslora"),
}
# Initializations of adapters that leave the base weights unchanged.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def names_of(config: ModelConfig) -> list[names.Name]:
  """Returns the names of all parameters of a model's adapters, as `names.names_of` does."""
  adapters = []
  for name in names.names_of(config):
    path, _, last = name.path.rpartition("/")
    if last != "kernel" or not lora.linear_maps([name.path]) or not config.lora.rank_of(path):
      continue
    module = name.tensor.removesuffix(".weight")
    for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
      adapters.append(names.Name(f"{path}/{ours}", f"{module}.{theirs}.weight", "transposed"))
  return adapters


_MODULES = {
  "vision": (("vision.", ""),),
  "language": (("language.lm_head.", "lm_head."), ("language.", "model.")),
}


def module_name(canonical: str, config: ModelConfig, tower: str = "") -> str:
  """Returns the tensor's name in transformers 5's class of the model or of a tower.

  Args:
    canonical: from `names.canonical`.
    config: of the model.
    tower: "vision", "language", or "" for the whole model.
  """
  prefixes = _MODULES[tower] if tower else families.of(config).modules
  return names.replace_prefix(canonical, *prefixes)


def directories(directory: str) -> dict[str, str]:
  """Returns tower -> its PEFT directory, or {"": directory} for adapters of a LLaVA."""
  if os.path.exists(os.path.join(directory, CONFIG)):
    return {"": directory}
  paths = {tower: os.path.join(directory, tower) for tower in hf_config.TOWERS}
  towers = {tower: x for tower, x in paths.items() if os.path.isfile(os.path.join(x, CONFIG))}
  return towers or {"": directory}


def read_config(directory: str) -> dict[str, Any]:
  """Reads adapter_config.json.

  Raises:
    InputError: it is missing, or describes something other than plain LoRA.
  """
  path = os.path.join(directory, CONFIG)
  config = json_files.read(path)
  if config is None:
    raise InputError(f"{path} is missing: {directory} is not a PEFT directory")
  if config.get("peft_type") != "LORA":
    raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
  other = {key: value for key, value in config.items() if key not in _PLAIN and value}
  if config.get("bias", "none") != "none":
    other["bias"] = config["bias"]
  if config.get("init_lora_weights", True) not in _PLAIN_INITS:
    other["init_lora_weights"] = config["init_lora_weights"]
  if other:
    shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in sorted(other.items()))
    raise InputError(f"{path}: {shown}: only plain LoRA adapters are supported")
  for key, kind in (("r", int), ("lora_alpha", (int, float))):
    if not isinstance(config.get(key), kind) or config[key] <= 0:
      raise InputError(f"{path}: {key} is {config.get(key)!r}; it must be a positive number")
  return config


def scale(config: dict[str, Any], module: str, rank: int) -> float:
  """Returns an adapter's scale by adapter_config.json; `module` is its name in the HF model."""
  alpha = config["lora_alpha"]
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      alpha = value
      break
  return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def find_tensors(directory: str) -> dict[str, tensors.Tensor]:
  """Returns the tensors of a PEFT directory by canonical name; reads headers only.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = os.path.join(directory, WEIGHTS)
  if not os.path.isfile(path):
    raise InputError(
      f"{path} is missing: pickled adapters cannot be read; save them as safetensors "
      "(save_pretrained of peft does)"
    )
  return tensors.read_headers(path, lambda name: names.canonical(name.removeprefix(PREFIX)))
