"""Exports a training run as a Hugging Face directory.

  python scripts/export_hf.py --checkpoint=RUN_DIR --output=HF_DIR [--dtype=bfloat16]

RUN_DIR stands for its newest checkpoint; RUN_DIR/checkpoints/STEP and RUN_DIR/checkpoints/best (by
the run's config.best_metric) name others.

LlavaForConditionalGeneration.from_pretrained and AutoProcessor.from_pretrained load the result.
"""

import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from vlalign_jax import cli, storage
from vlalign_jax.config import DTYPES, shared
from vlalign_jax.errors import InputError
from vlalign_jax.models import vlm
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.training import checkpoints
from vlalign_jax.weights import export, load, source

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A run directory, or a checkpoint of one.")
_OUTPUT = flags.DEFINE_string("output", "", "The directory to write; must not hold anything.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights; default: as trained.")


def export_run(run: str, output: str, dtype: str | None) -> None:
  """Writes a checkpoint of a run, by default the newest, with the frozen weights it stands on."""
  storage.check(run, "--checkpoint")
  found = checkpoints.find_run(run) if run else None
  if not found:
    raise InputError(f"--checkpoint {run!r} is not a run directory: it has no checkpoints/")
  if not output:
    raise InputError("--output is missing: the directory to write")
  export.check_output(output)
  opened = source.open_source(ConfigDict({**shared().model, "init_from": run}))
  param_dtype = source.run_config(found[0])["model"]["param_dtype"]
  _, abstract = vlm.abstract_params(opened.config, param_dtype=param_dtype)
  mesh = meshes.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
  abstract = meshes.place(abstract, zero.shardings(mesh, abstract, split=True))
  params = load.load_params(opened, abstract)
  export.export_model(opened, params, output, dtype=np.dtype(dtype) if dtype else None)
  step = opened.runs[-1][1]
  logging.info("exported step %d of %s to %s", step, run, output)


def main(_):
  export_run(_CHECKPOINT.value, _OUTPUT.value, _DTYPE.value)


if __name__ == "__main__":
  cli.run(main)
