"""The adapters of a training run as a PEFT directory."""

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
from vlalign_jax.weights import export, hf_config, names, peft

# Modules, as PEFT calls them, that hold what may be trained beside adapters.
BESIDE = {
  "projector/": "multi_modal_projector",
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
  """Writes a PEFT directory, or one for each tower (see `weights.peft`); all appears or nothing.

  Args:
    config: the model with its adapters.
    params: path -> (sharded) array of all that was trained; every process must call.
    output: a directory that does not exist yet or is empty.
    bases: "" or a tower -> the Hugging Face model that its adapters belong to, where it is known.
    dtype: of the written tensors; None: float32.

  Raises:
    InputError: `output` holds something already; or PEFT has no place for something that was
      trained.
  """
  dtype, bases = np.dtype(dtype or np.float32), bases or {}
  params = dict(params)
  _check_beside(config, params)
  _merge_adapters_of_trained(config, params)
  table = [name for name in peft.names_of(config) if name.path in params]
  beside = [name for name in names.names_of(config) if name.path in params]
  with export.appearing(output) as directory:
    for tower, prefixes in _towers(config).items():
      adapted = [name for name in table if name.path.startswith(prefixes)]
      whole = [name for name in beside if name.path.startswith(prefixes)]
      tensors = export.gather([*adapted, *whole], params, dtype)
      content = {peft.PREFIX + peft.module_name(name, tower): tensor for name, tensor in tensors}
      if directory and content:
        written = _adapter_config(config, adapted, whole, bases.get(tower), tower)
        _save(os.path.join(directory, tower), peft.WEIGHTS, content)
        json_files.write(os.path.join(directory, tower, peft.CONFIG), written)
    if not export.is_llava(config):
      whole = [name for name in beside if name.path.startswith("projector/")]
      content = {names.exported_part(n): x for n, x in export.gather(whole, params, dtype)}
      if directory and content:
        _save(directory, f"{hf_config.PROJECTOR}.safetensors", content)


def _towers(config: ModelConfig) -> dict[str, tuple[str, ...]]:
  """Directory below the output -> prefixes of the paths of what it holds."""
  return {"": ("",)} if export.is_llava(config) else hf_config.TOWERS


def _save(directory: str, file: str, content: dict[str, np.ndarray]) -> None:
  os.makedirs(directory, exist_ok=True)
  save_file(content, os.path.join(directory, file), metadata={"format": "pt"})


def _check_beside(config: ModelConfig, params) -> None:
  """Refuses what was trained beside adapters, or adapters, where PEFT has no place for them."""
  whole = [path for path in params if not lora.is_adapter(path)]
  wrong = [path for path in whole if not path.startswith(tuple(BESIDE))]
  if not export.is_llava(config):
    towers = hf_config.TOWERS.values()
    adapted = {path for path in params if lora.is_adapter(path)}
    wrong += sorted(path for path in adapted if path.startswith("projector/"))
    wrong += [
      path
      for prefixes in towers
      for path in whole
      if path.startswith(prefixes) and not any(x.startswith(prefixes[0]) for x in adapted)
    ]
  if wrong:
    raise InputError(
      f"{wrong[0]} was trained, and PEFT has no place for it beside these adapters; export the "
      "merged model (without --adapters)"
    )
  if "language/embedding/embedding" in params and config.language.tied_embeddings:
    raise InputError(
      "the token embedding was trained, and is the output head too: PEFT would untie them; export "
      "the merged model (without --adapters)"
    )


def _merge_adapters_of_trained(config: ModelConfig, params) -> None:
  """A module is saved whole or has an adapter: what is both becomes the sum."""
  for path in [path for path in params if path.endswith("/kernel")]:
    module = path.removesuffix("/kernel")
    if f"{module}/lora_a" in params:
      a, b = (params.pop(f"{module}/{name}") for name in lora.NAMES)
      kernel = jnp.copy(params[path])  # which is given up
      scale = config.lora.scale(a.shape[-1])
      params[path] = lora.merge(kernel, a, b, scale, kernel.sharding)


def _adapter_config(config: ModelConfig, adapted, whole, base: str | None, tower: str) -> dict:
  """The content of adapter_config.json for adapters and what was trained beside them."""
  targets, ranks = [], config.lora
  for name in adapted:
    if name.path.endswith("/lora_a"):
      module = re.escape(peft.module_name(name.tensor.removesuffix(".lora_A.weight"), tower))
      # Counted out for the vision tower, of which we may run only the first layers.
      layers = range(config.vision.layers) if name.path.startswith("vision/") else ()
      number = f"(?:{'|'.join(map(str, layers))})" if layers else r"\d+"
      targets.append(module.replace(re.escape("{}"), number))
  rank, alpha = ranks.rank or ranks.vision_rank, ranks.alpha
  pattern = {}
  if tower == "vision":
    rank = ranks.vision_rank
  elif not tower and ranks.vision_rank not in (0, rank):
    pattern = {"vision_tower.*": ranks.vision_rank}
  modules = {
    module
    for prefix, module in BESIDE.items()
    if any(name.path.startswith(prefix) for name in whole)
  }
  llava = {
    "base_model_class": "LlavaForConditionalGeneration",
    "parent_library": "transformers.models.llava.modeling_llava",
  }
  return {
    "peft_type": "LORA",
    "task_type": None,
    "auto_mapping": None if tower else llava,
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
