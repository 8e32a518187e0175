"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors.

Tensors are called as in the modules of transformers 5's LlavaForConditionalGeneration, below PEFT's
`base_model.model.`. What was trained beside the adapters is in the same file, as PEFT keeps
`modules_to_save`; a reward model's head is the module `score`.

Of a model that is no LLaVA (see `weights.export`) the adapters of each tower are a PEFT directory
for that tower, `vision/` and `language/`, and a trained projector lies beside these, in
`projector.safetensors`.
"""

import json
import os
import re
from typing import Any

from vlalign_jax import json_files
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import hf_config, names, tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of adapter_config.json that plain adapters may have; others change what adapters compute.
_PLAIN = {
  *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
  *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
  *("layers_to_transform", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
  *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
  *("revision", "target_modules", "task_type", "use_rslora"),
}
# How adapters began is of no matter, unless it changed the weights that they are added to.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


def names_of(config: ModelConfig) -> list[names.Name]:
  """The parameters of a model's adapters with their tensors' names, as in `names.names_of`."""
  found = []
  for name in names.names_of(config):
    path, _, last = name.path.rpartition("/")
    if last != "kernel" or not lora.linear_maps([name.path]) or not config.lora.rank_of(path):
      continue
    module = name.tensor.removesuffix(".weight")
    for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
      found.append(names.Name(f"{path}/{ours}", f"{module}.{theirs}.weight", "transposed"))
  return found


_MODULES = {
  "": (
    ("vision.", "model.vision_tower."),
    ("projector.", "model.multi_modal_projector."),
    ("language.lm_head.", "lm_head."),
    ("language.", "model.language_model."),
  ),
  "vision": (("vision.", ""),),
  "language": (("language.lm_head.", "lm_head."), ("language.", "model.")),
}


def module_name(canonical: str, tower: str = "") -> str:
  """A canonical name in transformers 5's LlavaForConditionalGeneration, or in a tower's own class.

  Args:
    canonical: of `names.canonical`.
    tower: "vision", "language", or "": the name in a LLaVA.
  """
  for ours, theirs in _MODULES[tower]:
    if canonical.startswith(ours):
      return theirs + canonical[len(ours) :]
  return canonical


def directories(directory: str) -> dict[str, str]:
  """Tower -> its PEFT directory, or "" -> the one directory of a LLaVA's adapters."""
  towers = {tower: os.path.join(directory, tower) for tower in hf_config.TOWERS}
  found = {
    tower: path for tower, path in towers.items() if os.path.isfile(os.path.join(path, CONFIG))
  }
  return found if not os.path.exists(os.path.join(directory, CONFIG)) and found else {"": directory}


def read_config(directory: str) -> dict[str, Any]:
  """adapter_config.json of adapters that are computed as ours are.

  Raises:
    InputError: there is none, or it asks for something else than plain LoRA.
  """
  path = os.path.join(directory, CONFIG)
  config = json_files.read(path)
  if config is None:
    raise InputError(f"{path} is missing: {directory} is no PEFT directory")
  if config.get("peft_type") != "LORA":
    raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
  other = {key: value for key, value in config.items() if key not in _PLAIN and value}
  if config.get("bias", "none") != "none":
    other["bias"] = config["bias"]
  if config.get("init_lora_weights", True) not in _PLAIN_BEGINNINGS:
    other["init_lora_weights"] = config["init_lora_weights"]
  if other:
    shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in sorted(other.items()))
    raise InputError(f"{path}: {shown}: only plain LoRA adapters are supported")
  for key, kind in (("r", int), ("lora_alpha", (int, float))):
    if not isinstance(config.get(key), kind) or config[key] <= 0:
      raise InputError(f"{path}: {key} is {config.get(key)!r}; mend it")
  return config


def scale(config: dict[str, Any], module: str, rank: int) -> float:
  """What an adapter counts by adapter_config.json; `module` is its name in the HF model."""
  alpha = config["lora_alpha"]
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      alpha = value
      break
  return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def find_tensors(directory: str) -> dict[str, tensors.Tensor]:
  """The tensors of a PEFT directory by canonical name; reads headers only.

  Raises:
    InputError: there are none, or the file is damaged.
  """
  path = os.path.join(directory, WEIGHTS)
  if not os.path.isfile(path):
    raise InputError(
      f"{path} is missing: pickled adapters are not read; save them as safetensors "
      "(save_pretrained in peft does)"
    )
  return tensors.read_headers(path, lambda name: names.canonical(name.removeprefix(PREFIX)))
