"""Which parameters of several models are the same, told before any is loaded."""

import collections
import os

from vlalign_jax import trees
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.weights import load, provenance
from vlalign_jax.weights.parts import ModelSource

# Bytes that are compared at a time.
_BLOCK = 2**22


class Files:
  """Names files so that those of equal content have one name; a copy is read whole to be sure."""

  def __init__(self):
    self._names: dict[str, str] = {}
    self._alike = collections.defaultdict(list)  # fingerprint -> files of different content

  def name(self, file: str) -> str:
    """The first of the files so far with the content of this one."""
    file = os.path.realpath(file)
    if file not in self._names:
      alike = self._alike[provenance.fingerprint(file)]  # of samples, which may miss a difference
      same = (other for other in alike if _same(file, other))
      self._names[file] = next(same, file)
      if self._names[file] == file:
        alike.append(file)
    return self._names[file]


def _same(file: str, other: str) -> bool:
  """Whether two files have the same bytes; links to one are not read."""
  if os.path.samefile(file, other):
    return True
  if os.path.getsize(file) != os.path.getsize(other):
    return False
  with open(file, "rb", buffering=0) as first, open(other, "rb", buffering=0) as second:
    while block := first.read(_BLOCK):
      if block != second.read(len(block)):
        return False
  return True


def identities(source: ModelSource, files: Files) -> dict[str, tuple]:
  """path -> what a parameter's values come from; equal ones are equal, and fresh ones have none.

  That is the file with its tensors, or the checkpoint of the run that trained it last, with the
  runs whose adapters are merged into it behind.

  Args:
    source: the model.
    files: of all models that are compared.
  """
  shapes = {
    path: leaf.shape for path, leaf in trees.flatten(vlm.abstract_params(source.config)[1]).items()
  }
  found = {
    path: tuple((tensor.name, files.name(tensor.file)) for tensor in entry.tensors)
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


def _key(path: str, known: dict, leaf) -> tuple:
  """Parameters of one key are one on the devices."""
  return path, known.get(path), leaf.shape, leaf.dtype, leaf.sharding


def add(pool: dict, known: dict, leaves: dict) -> None:
  """Puts parameters that stay where later models find them; fresh ones are nobody else's.

  Args:
    pool: key -> array or shape with its sharding, of all models so far.
    known: of `identities`.
    leaves: path -> array or shape.
  """
  for path, leaf in leaves.items():
    if path in known:
      pool.setdefault(_key(path, known, leaf), leaf)


def find(pool: dict, known: dict, leaves: dict) -> dict:
  """path -> what the pool has of another model's parameters, where it has it; see `add`."""
  keys = {path: _key(path, known, leaf) for path, leaf in leaves.items()}
  return {path: pool[key] for path, key in keys.items() if key in pool}


def same_tower(model: vlm.ModelConfig, known: dict, other: vlm.ModelConfig, others: dict) -> bool:
  """Whether the vision towers of two models give the same, wherever their parameters are.

  Args:
    model, other: the architectures.
    known, others: of `identities`.
  """
  mine, its = (
    [f"vision/{path}" for path in trees.flatten(vlm.abstract_params(one)[1]["vision"])]
    for one in (model, other)
  )
  same = (path in known and known[path] == others.get(path) for path in mine)
  return model.vision == other.vision and mine == its and all(same)
