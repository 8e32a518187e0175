"""Exports a training run as a Hugging Face directory.

  python scripts/export_hf.py --checkpoint=RUN_DIR --output=HF_DIR [--dtype=bfloat16] [--adapters]

RUN_DIR stands for its newest checkpoint; RUN_DIR/checkpoints/STEP and RUN_DIR/checkpoints/best (by
the run's config.metric_for_best_model) name others. --checkpoint also takes a PEFT directory, which
is merged into its base, and a model in the layout of LLaVA's own repository.

AutoModelForImageTextToText.from_pretrained and AutoProcessor.from_pretrained load the result.
Weights that were not trained, also those that never run, such as the vision tower's last layers and
post_layernorm, have the bits of the model that the run started from; --dtype converts all weights.

A LoRA run's adapters are merged into the weights. With --adapters they are written alone, for
peft.PeftModel.from_pretrained on the model that the run started from.

A model that transformers has no class for (see vlalign_jax/weights/export.py) is written in parts:
its projector, and its towers in vision/ and language/, which transformers loads as models. Its
adapters are written in the same parts.
"""

import dataclasses
import os

import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from vlalign_jax import cli, storage, trees
from vlalign_jax.config import DTYPES, shared
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.weights import export, export_adapters, families, hf_config, load, runs, source


def export_run(run: str, output: str, dtype: str | None, adapters: bool = False) -> None:
  """Writes a checkpoint of a run, by default the newest, with its frozen weights."""
  storage.check(run, "--checkpoint")
  checkpoint = checkpoints.find_run(run) if run else None
  if run and not checkpoint and source.is_convertible(run):
    _export_directory(run, output, dtype, adapters)
    return
  if not checkpoint:
    raise InputError(f"--checkpoint {run!r} is not a run directory: it has no checkpoints/")
  if not output:
    raise InputError("--output is missing: the directory to write")
  export.check_output(output)
  opened = source.open_source(ConfigDict({**shared().model, "init_from": run}))
  config = run_directory.stored_config(checkpoint[0])
  model = opened.config
  if adapters:
    model = dataclasses.replace(model, lora=lora.from_group(config["lora"]))
    if not model.lora:
      raise InputError(f"--adapters: {run} trained no adapters; export it without")
  _, abstract = vlm.abstract_params(model, param_dtype=config["model"]["param_dtype"])
  mesh = meshes.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
  abstract = meshes.place(abstract, zero.shardings(mesh, abstract, split=True))
  directory, step = opened.runs[-1]
  dtype = np.dtype(dtype) if dtype else None
  if adapters:
    leaves = trees.flatten(abstract)
    placement = {path: leaf.sharding for path, leaf in leaves.items()}
    trained = checkpoints.restore_params(directory, step, leaves, placement)
    bases = _find_bases(config["model"], families.in_transformers(model))
    export_adapters.export_adapters(model, trained, output, bases=bases, dtype=dtype)
  else:
    trained = runs.trained_paths(opened)  # the rest is copied from file to file
    params = load.load_params(
      opened, abstract, wanted=lambda path: path in trained or path.startswith(opened.fresh)
    )
    export.export_model(opened, params, output, dtype=dtype)
  logging.info("exported step %d of %s to %s", step, run, output)


def _export_directory(directory: str, output: str, dtype: str | None, adapters: bool) -> None:
  """Writes a PEFT directory over its base, or a model in LLaVA's own layout, as one model."""
  if adapters:
    raise InputError(f"--adapters: {directory} is not a run; export it without")
  if not output:
    raise InputError("--output is missing: the directory to write")
  export.check_output(output)
  opened = source.open_source(ConfigDict({**shared().model, "init_from": directory}))
  stored = opened.tensors["language.norm.weight"].read().dtype
  _, abstract = vlm.abstract_params(opened.config, param_dtype=stored)
  mesh = meshes.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
  abstract = meshes.place(abstract, zero.shardings(mesh, abstract, split=True))
  params = load.load_params(opened, abstract)
  export.export_model(opened, params, output, dtype=np.dtype(dtype) if dtype else None)
  logging.info("exported %s to %s", directory, output)


def _find_bases(model: dict, whole: bool) -> dict[str, str]:
  """Returns tower (or "" for all) -> the Hugging Face model that adapters belong to, if any."""
  start = model["init_from"]
  if start and not checkpoints.find_run(start):
    return {"": start} | {tower: os.path.join(start, tower) for tower in hf_config.TOWERS}
  if not start and not whole:
    return {tower: model[tower] for tower in hf_config.TOWERS}
  logging.info(
    "these adapters belong to the model that the run started from (%s), which is not a Hugging "
    "Face model; export without --adapters for a model that needs no other",
    start or f"{model['vision']} with {model['language']}",
  )
  return {}


def main(_):
  args = flags.FLAGS
  export_run(args.checkpoint, args.output, args.dtype, args.adapters)


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", "", "A run directory, or a checkpoint of one.")
  flags.DEFINE_string("output", "", "The directory to write; must be empty or missing.")
  flags.DEFINE_enum("dtype", None, DTYPES, "Of all weights; default: as trained or stored.")
  flags.DEFINE_bool("adapters", False, "Write only a LoRA run's adapters, in PEFT's format.")
  cli.run(main)
