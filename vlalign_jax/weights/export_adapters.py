"""Writes the adapters of a training run as a PEFT directory."""

import os
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlalign_jax import json_files
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import export, families, hf_config, names, peft

# Path prefix of parameters that may be fully trained with adapters -> their module in PEFT.
MODULES_TO_SAVE = {
  "projector/": "",  # its name depends on the family
  "language/embedding/": "embed_tokens",
  "score/": "score",
}


def export_adapters(
  config: ModelConfig,
  params,
  output: str,
  *,
  bases: Mapping[str, str] | None = None,
  dtype: np.dtype | None = None,
) -> None:
  """Writes a PEFT directory, or one for each tower (see `weights.peft`), completely or not at all.

  Every process must call this.

  Args:
    config: the model with its adapters.
    params: path -> (sharded) array of all trained parameters.
    output: a directory that does not exist yet or is empty.
    bases: "" or a tower -> the Hugging Face model that its adapters belong to, if it is known.
    dtype: of the written tensors; None: float32.

  Raises:
    InputError: `output` is not empty, or PEFT has no place for a trained parameter.
  """
  dtype, bases = np.dtype(dtype or np.float32), bases or {}
  params = dict(params)
  _check_fully_trained(config, params)
  _merge_adapters_of_trained(config, params)
  adapters = [name for name in peft.names_of(config) if name.path in params]
  others = [name for name in names.names_of(config) if name.path in params]
  with export.appearing(output) as directory:
    for tower, prefixes in _towers(config).items():
      adapted = [name for name in adapters if name.path.startswith(prefixes)]
      full = [name for name in others if name.path.startswith(prefixes)]
      tensors = export.gather([*adapted, *full], params, dtype)
      content = {peft.PREFIX + peft.module_name(name, config, tower): x for name, x in tensors}
      if directory and content:
        adapter_config = _adapter_config(config, adapted, full, bases.get(tower), tower)
        _save(os.path.join(directory, tower), peft.WEIGHTS, content)
        json_files.write(os.path.join(directory, tower, peft.CONFIG), adapter_config)
    if not families.in_transformers(config):
      projector = [name for name in others if name.path.startswith("projector/")]
      content = {names.exported_part(n): x for n, x in export.gather(projector, params, dtype)}
      if directory and content:
        _save(directory, f"{hf_config.PROJECTOR}.safetensors", content)


def _towers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
  """Returns directory below the output -> path prefixes of the parameters in it."""
  return {"": ("",)} if families.in_transformers(config) else hf_config.TOWERS


def _save(directory: str, file: str, content: dict[str, np.ndarray]) -> None:
  os.makedirs(directory, exist_ok=True)
  save_file(content, os.path.join(directory, file), metadata={"format": "pt"})


def _check_fully_trained(config: ModelConfig, params) -> None:
  """Raises an InputError for trained parameters that PEFT has no place for."""
  full = [path for path in params if not lora.is_adapter(path)]
  wrong = [path for path in full if not path.startswith(tuple(MODULES_TO_SAVE))]
  if not families.in_transformers(config):
    adapted = {path for path in params if lora.is_adapter(path)}
    wrong += sorted(path for path in adapted if path.startswith("projector/"))
    wrong += [
      path
      for prefixes in hf_config.TOWERS.values()
      for path in full
      if path.startswith(prefixes) and not any(x.startswith(prefixes[0]) for x in adapted)
    ]
  if wrong:
    raise InputError(
      f"{wrong[0]} was trained, and PEFT has no place for it with these adapters; export the "
      "merged model (without --adapters)"
    )
  if "language/embedding/embedding" in params and config.language.tied_embeddings:
    raise InputError(
      "the token embedding was trained and is tied to the output head: PEFT would untie them; "
      "export the merged model (without --adapters)"
    )


def _merge_adapters_of_trained(config: ModelConfig, params) -> None:
  """Merges adapters into fully trained kernels: in PEFT a module has one or the other."""
  for path in [path for path in params if path.endswith("/kernel")]:
    module = path.removesuffix("/kernel")
    if f"{module}/lora_a" in params:
      a, b = (params.pop(f"{module}/{name}") for name in lora.NAMES)
      kernel = jnp.copy(params[path])  # lora.merge donates it
      scale = config.lora.scale(a.shape[-1])
      params[path] = lora.merge(kernel, a, b, scale, kernel.sharding)


def _module(config: ModelConfig, part: str) -> str:
  """Returns the name of a part, such as "vision.", in the model's class."""
  return dict(families.of(config).modules)[part].rstrip(".").rpartition(".")[2]


def _adapter_config(config: ModelConfig, adapted, full, base: str | None, tower: str) -> dict:
  """Returns adapter_config.json for adapters and fully trained parameters, as Names."""
  targets, ranks = [], config.lora
  for name in adapted:
    if name.path.endswith("/lora_a"):
      module = re.escape(
        peft.module_name(name.tensor.removesuffix(".lora_A.weight"), config, tower)
      )
      # The vision tower's are listed one by one, since we may run only its first layers.
      layers = range(config.vision.layers) if name.path.startswith("vision/") else ()
      number = f"(?:{'|'.join(map(str, layers))})" if layers else r"\d+"
      targets.append(module.replace(re.escape("{}"), number))
  rank, alpha = ranks.rank or ranks.vision_rank, ranks.alpha
  pattern = {}
  if tower == "vision":
    rank = ranks.vision_rank
  elif not tower and ranks.vision_rank not in (0, rank):
    pattern = {f"{_module(config, 'vision.')}.*": ranks.vision_rank}
  modules = {
    module or _module(config, "projector.")
    for prefix, module in MODULES_TO_SAVE.items()
    if any(name.path.startswith(prefix) for name in full)
  }
  family = families.of(config)
  whole = {"base_model_class": family.architecture, "parent_library": family.module}
  return {
    "peft_type": "LORA",
    "task_type": None,
    "auto_mapping": None if tower else whole,
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": rank,
    "rank_pattern": pattern,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    "alpha_pattern": {},
    "lora_dropout": ranks.dropout,
    "use_rslora": ranks.use_rslora,
    "target_modules": "|".join(targets),
    "modules_to_save": sorted(modules) or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
  }
