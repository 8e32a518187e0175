"""Reads from the checkpoints of earlier runs: trained parameters, and adapters to be merged."""

import dataclasses

from vlalign_jax import trees
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.sharding import zero
from vlalign_jax.weights.parts import ModelSource


def trained_paths(source: ModelSource) -> set[str]:
  """Returns the paths of all parameters that the runs of a source have changed.

  In place of an adapter's paths it has that of the kernel that the adapter is merged into.

  Raises:
    InputError: a checkpoint cannot be read.
  """
  paths = set()
  for directory, step in source.runs:
    for path in checkpoints.trained_paths(directory, step):
      paths.add(f"{path.rpartition('/')[0]}/kernel" if lora.is_adapter(path) else path)
  return paths


def restore(source: ModelSource, leaves, placement):
  """Restores the parameters that the `runs` of a source have trained.

  Args:
    source: the model.
    leaves: path -> jax.ShapeDtypeStruct of the parameters to restore.
    placement: path -> sharding.

  Returns:
    (path -> array of fully trained parameters, path of a kernel -> list of the adapters (a, b,
    scale) to merge into it, in order).

  Raises:
    InputError: a checkpoint cannot be read, or is of another model.
  """
  loaded, merges = {}, {}
  # The adapters in these checkpoints are those of earlier runs, which are merged.
  weights = {path: leaf for path, leaf in leaves.items() if not lora.is_adapter(path)}
  for directory, step in source.runs:
    trained = checkpoints.restore_params(directory, step, weights, placement)
    loaded |= trained
    merges = {path: adapters for path, adapters in merges.items() if path not in trained}
    config = lora.from_group(run_directory.stored_config(directory)["lora"])
    if config:
      for path, adapter in _adapters_of(source, config, directory, step, weights, placement):
        merges.setdefault(path, []).append(adapter)
  return loaded, merges


def _adapters_of(source: ModelSource, config: lora.LoraConfig, directory, step, weights, placement):
  """Yields (path of a kernel among `weights`, (a, b, scale)) of a run's adapters."""
  model = dataclasses.replace(source.config, lora=config)
  shapes = trees.flatten(vlm.abstract_params(model)[1])
  kernels = {path: f"{path.rpartition('/')[0]}/kernel" for path in shapes if lora.is_adapter(path)}
  shapes = {path: shapes[path] for path, kernel in kernels.items() if kernel in weights}
  mesh = next(iter(placement.values())).mesh
  shardings = trees.flatten(zero.shardings(mesh, trees.unflatten(shapes), split=True))
  adapters = checkpoints.restore_params(directory, step, shapes, shardings)
  for path, a in adapters.items():
    if path.endswith("/lora_a"):
      b = adapters[f"{path.removesuffix('/lora_a')}/lora_b"]
      yield kernels[path], (a, b, config.scale(a.shape[-1]))
