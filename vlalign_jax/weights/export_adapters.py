"""The adapters of a training run as a PEFT directory."""

import os
import re

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlalign_jax import json_files
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.weights import export, names, peft

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
  base: str | None = None,
  dtype: np.dtype | None = None,
) -> None:
  """Writes a PEFT directory; it appears whole or not at all.

  Args:
    config: the model with its adapters.
    params: path -> (sharded) array of all that was trained; every process must call.
    output: a directory that does not exist yet or is empty.
    base: the Hugging Face model that the adapters belong to, if it is known.
    dtype: of the written tensors; None: float32.

  Raises:
    InputError: `output` holds something already; or PEFT has no place for something that was
      trained.
  """
  dtype = np.dtype(dtype or np.float32)
  params = dict(params)
  modules = _modules_beside(config, params)
  _merge_adapters_of_trained(config, params)
  table = [name for name in peft.names_of(config) if name.path in params]
  beside = [name for name in names.names_of(config) if name.path in params]
  content = {
    peft.PREFIX + peft.module_name(name): tensor
    for name, tensor in export.gather([*table, *beside], params, dtype)
  }
  with export.appearing(output) as directory:
    if directory:
      save_file(content, os.path.join(directory, peft.WEIGHTS), metadata={"format": "pt"})
      written = _adapter_config(config, table, modules, base)
      json_files.write(os.path.join(directory, peft.CONFIG), written)


def _modules_beside(config: ModelConfig, params) -> list[str]:
  """`modules_to_save` for what was trained beside adapters."""
  modules = set()
  for path in params:
    if lora.is_adapter(path):
      continue
    found = [module for prefix, module in BESIDE.items() if path.startswith(prefix)]
    if not found:
      raise InputError(
        f"{path} was trained whole, beside the adapters, and PEFT has no place for it; export the "
        "merged model (without --adapters)"
      )
    modules.update(found)
  if "embed_tokens" in modules and config.language.tied_embeddings:
    raise InputError(
      "the token embedding was trained, and is the output head too: PEFT would untie them; export "
      "the merged model (without --adapters)"
    )
  return sorted(modules)


def _merge_adapters_of_trained(config: ModelConfig, params) -> None:
  """A module is saved whole or has an adapter: what is both becomes the sum."""
  for path in [path for path in params if path.endswith("/kernel")]:
    module = path.removesuffix("/kernel")
    if f"{module}/lora_a" in params:
      a, b = (params.pop(f"{module}/{name}") for name in lora.NAMES)
      kernel = jnp.copy(params[path])  # which is given up
      scale = config.lora.scale(a.shape[-1])
      params[path] = lora.merge(kernel, a, b, scale, kernel.sharding)


def _adapter_config(config: ModelConfig, table, modules: list[str], base: str | None) -> dict:
  adapted, ranks = [], config.lora
  for name in table:
    if name.path.endswith("/lora_a"):
      module = re.escape(peft.module_name(name.tensor.removesuffix(".lora_A.weight")))
      # Counted out for the vision tower, of which we may run only the first layers.
      layers = range(config.vision.layers) if name.path.startswith("vision/") else ()
      number = f"(?:{'|'.join(map(str, layers))})" if layers else r"\d+"
      adapted.append(module.replace(re.escape("{}"), number))
  rank, alpha = ranks.rank or ranks.vision_rank, ranks.alpha
  pattern = {} if ranks.vision_rank in (0, rank) else {"vision_tower.*": ranks.vision_rank}
  return {
    "peft_type": "LORA",
    "task_type": None,
    "auto_mapping": {
      "base_model_class": "LlavaForConditionalGeneration",
      "parent_library": "transformers.models.llava.modeling_llava",
    },
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": rank,
    "rank_pattern": pattern,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    "alpha_pattern": {},
    "lora_dropout": ranks.dropout,
    "use_rslora": ranks.rank_stabilised,
    "target_modules": "|".join(adapted),
    "modules_to_save": modules or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
  }
