"""Which parameters of two models are the same, told before any is read."""

from vlalign_jax import trees
from vlalign_jax.models import lora, vlm
from vlalign_jax.training import checkpoints, run_directory
from vlalign_jax.weights import load, pin
from vlalign_jax.weights.parts import Source


def identities(source: Source) -> dict[str, tuple]:
  """path -> what a parameter's values come from; equal ones are equal, and fresh ones have none.

  That is the fingerprint of the file with its tensors, or the checkpoint of the run that trained it
  last, with the runs whose adapters are merged into it behind.
  """
  shapes = {
    path: leaf.shape for path, leaf in trees.flatten(vlm.abstract_params(source.config)[1]).items()
  }
  prints = {}  # each file once

  def of_file(file: str) -> str:
    if file not in prints:
      prints[file] = pin.fingerprint(file)
    return prints[file]

  found = {
    path: tuple((tensor.name, of_file(tensor.file)) for tensor in entry.tensors)
    for path, entry in load.resolve(source, shapes).items()
  }
  for run in source.runs:
    trained = checkpoints.trained_paths(*run)
    found |= {path: (run,) for path in trained if path in shapes and not lora.is_adapter(path)}
    if lora.from_group(run_directory.stored_config(run[0])["lora"]):
      for path in trained:
        kernel = f"{path.rpartition('/')[0]}/kernel"
        if path.endswith("/lora_a") and kernel in found:
          found[kernel] += (("adapters", *run),)
  if source.start and source.start.run:
    trained = checkpoints.trained_paths(*source.start.run)
    found |= {path: (source.start.run,) for path in trained if path in shapes}
  given = load.start_entries(source)
  return {path: origin for path, origin in found.items() if path not in given}
