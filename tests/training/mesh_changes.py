"""A run that goes on over other devices, run as a process of its own by test_mesh_changes.

python -m tests.training.mesh_changes DIRECTORY

Writes one JSON object: run -> its metrics, and whether it began with the parameters of the
checkpoint, bit for bit.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from scripts import train_sft
from tests import sft_run, tiny_models
from vlalign_jax import trees
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import rules
from vlalign_jax.training import loop

STEPS, SAVED = 6, 3
FIRST = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.zero_stage": 3}
# Name -> (devices, what differs from FIRST).
RUNS = {
  "the same": (8, {}),
  "ZeRO 0 on one device": (1, {"mesh.fsdp": 1, "mesh.zero_stage": 0, "grad_accumulation": 2}),
  "ZeRO 2 on four": (4, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.zero_stage": 2}),
}


def params_of(step: pathlib.Path) -> dict[str, np.ndarray]:
  """Path -> trained parameter of a checkpoint."""
  with ocp.StandardCheckpointer() as reader:
    return {
      path: np.asarray(leaf)
      for path, leaf in trees.flatten(reader.restore(step / "params")).items()
    }


def equal(params, stored: dict[str, np.ndarray]) -> bool:
  """Whether sharded parameters are the stored ones."""
  found = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
  return found.keys() == stored.keys() and all(
    np.array_equal(leaf, stored[path]) for path, leaf in found.items()
  )


def main(directory: str) -> None:
  rules.MIN_SIZE = 32  # a tiny model has nothing as large as the true limit
  directory = pathlib.Path(directory)
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 48)
  train = sft_run.write_json(directory / "data" / "train.json", records)
  settings = {"batch_size": 16, "max_steps": STEPS, "save_every": SAVED, "save_total_limit": 2}
  make_mesh, run_loop, began = meshes.make_mesh, loop.run, {}

  def train_on(devices: int, name: str, overrides: dict) -> dict:
    def watched(config, workdir, stage, state, *rest):
      began["params"] = state.params
      began["split"] = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
      stored = directory / "run" / "checkpoints" / str(SAVED)
      began["equal"] = stored.exists() and equal(state.params, params_of(stored))
      return run_loop(config, workdir, stage, state, *rest)

    meshes.make_mesh = lambda group, _: make_mesh(group, jax.devices()[:devices])
    loop.run = watched
    config = sft_run.make_config(directory / "model", train, **(settings | FIRST | overrides))
    train_sft.train_and_evaluate(config, str(directory / name))
    return {
      "began_equal": began["equal"],
      "split": began["split"],
      "metrics": sft_run.read_metrics(directory / name),
    }

  found = {"uninterrupted": train_on(8, "run", {})}
  last = params_of(directory / "run" / "checkpoints" / str(STEPS))
  for name, (devices, overrides) in RUNS.items():
    place = shutil.copytree(directory / "run", directory / name)
    shutil.rmtree(place / "checkpoints" / str(STEPS))
    found[name] = train_on(devices, name, overrides)
    ended = params_of(place / "checkpoints" / str(STEPS))
    found[name]["ended_equal"] = equal(ended, last)
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1])
