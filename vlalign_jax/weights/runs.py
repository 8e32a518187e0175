"""What earlier runs have trained, from their checkpoints: parameters, and adapters to be merged."""

import dataclasses

from vlalign_jax import trees
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.sharding import zero
from vlalign_jax.weights.parts import ModelSource


def trained_paths(source: ModelSource) -> set[str]:
  """Returns the paths of all parameters that the runs of a source have changed.

  Adapters stand for the kernels that they are merged into.

  Raises:
    InputError: a checkpoint cannot be read.
  """
  paths = set()
  for directory, step in source.runs:
    for path in checkpoints.trained_paths(directory, step):
      paths.add(f"{path.rpartition('/')[0]}/kernel" if lora.is_adapter(path) else path)
  return paths


def restore(source: ModelSource, leaves, placement):
  """Restores what the runs that a source stands on have trained.

  Args:
    source: its `runs` count.
    leaves: path -> jax.ShapeDtypeStruct of the parameters that are wanted.
    placement: path -> sharding.

  Returns:
    (path -> array of what was trained whole, path of a kernel -> list of the (a, b, scale) to merge
    into it, in order).

  Raises:
    InputError: a checkpoint cannot be read, or is of another model.
  """
  loaded, merges = {}, {}
  # Adapters in a checkpoint are those of that run, never this one's.
  weights = {path: leaf for path, leaf in leaves.items() if not lora.is_adapter(path)}
  for directory, step in source.runs:
    found = checkpoints.restore_params(directory, step, weights, placement)
    loaded |= found
    merges = {path: added for path, added in merges.items() if path not in found}
    config = lora.from_group(run_directory.stored_config(directory)["lora"])
    if config:
      for path, adapter in _adapters_of(source, config, directory, step, weights, placement):
        merges.setdefault(path, []).append(adapter)
  return loaded, merges


def _adapters_of(source: ModelSource, config: lora.LoraConfig, directory, step, weights, placement):
  """(path of a kernel among `weights`, (a, b, scale)) of a run's adapters."""
  model = dataclasses.replace(source.config, lora=config)
  shapes = trees.flatten(vlm.abstract_params(model)[1])
  kernels = {path: f"{path.rpartition('/')[0]}/kernel" for path in shapes if lora.is_adapter(path)}
  shapes = {path: shapes[path] for path, kernel in kernels.items() if kernel in weights}
  mesh = next(iter(placement.values())).mesh
  places = trees.flatten(zero.shardings(mesh, trees.unflatten(shapes), split=True))
  found = checkpoints.restore_params(directory, step, shapes, places)
  for path, a in found.items():
    if path.endswith("/lora_a"):
      module = path.removesuffix("/lora_a")
      yield kernels[path], (a, found[f"{module}/lora_b"], config.scale(a.shape[-1]))
