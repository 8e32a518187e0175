"""Finds the parameters that several models have in common, before any of them is loaded."""

import collections
import os

from vlalign_jax import trees
from vlalign_jax.models import lora, vlm
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.weights import load, provenance
from vlalign_jax.weights.parts import ModelSource

_BLOCK = 2**22  # bytes that are compared at a time


class Files:
  """Gives files of equal content one name; files that look equal are compared byte by byte."""

  def __init__(self):
    self._names: dict[str, str] = {}
    self._alike = collections.defaultdict(list)  # fingerprint -> files of different content

  def name(self, file: str) -> str:
    """Returns the first of the files passed so far that has the content of this one."""
    file = os.path.realpath(file)
    if file not in self._names:
      alike = self._alike[provenance.fingerprint(file)]  # of samples, which may miss a difference
      self._names[file] = next((other for other in alike if _same(file, other)), file)
      if self._names[file] == file:
        alike.append(file)
    return self._names[file]


def _same(file: str, other: str) -> bool:
  """Returns whether two files have the same bytes; links to one file are not read."""
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
  """Returns path -> origin of a parameter; parameters of one path and origin are equal.

  The origin is the tensors with their files, or the checkpoint of the run that trained the
  parameter last, and then the runs whose adapters are merged into it. Fresh parameters and those
  from a PEFT directory are left out.

  Args:
    source: the model.
    files: shared by all models that are compared.
  """
  shapes = {
    path: leaf.shape for path, leaf in trees.flatten(vlm.abstract_params(source.config)[1]).items()
  }
  origins: dict[str, tuple] = {
    path: tuple((tensor.name, files.name(tensor.file)) for tensor in entry.tensors)
    for path, entry in load.resolve(source, shapes).items()
  }
  for run in source.runs:
    trained = checkpoints.trained_paths(*run)
    origins |= {path: (run,) for path in trained if path in shapes and not lora.is_adapter(path)}
    if lora.from_group(run_directory.stored_config(run[0])["lora"]):
      for path in trained:
        kernel = f"{path.rpartition('/')[0]}/kernel"
        if path.endswith("/lora_a") and kernel in origins:
          origins[kernel] += (("adapters", *run),)
  if source.start and source.start.run:
    trained = checkpoints.trained_paths(*source.start.run)
    origins |= {path: (source.start.run,) for path in trained if path in shapes}
  from_peft = load.start_entries(source)
  return {path: origin for path, origin in origins.items() if path not in from_peft}


def _key(path: str, known: dict, leaf) -> tuple:
  """Returns a key that is the same for parameters which can share their memory on the devices."""
  return path, known.get(path), leaf.shape, leaf.dtype, leaf.sharding


def add(pool: dict, known: dict, leaves: dict) -> None:
  """Adds frozen parameters to the pool, so that later models can share them; skips fresh ones.

  Args:
    pool: key -> array or shape with its sharding, of all models so far.
    known: from `identities`.
    leaves: path -> array or shape.
  """
  for path, leaf in leaves.items():
    if path in known:
      pool.setdefault(_key(path, known, leaf), leaf)


def find(pool: dict, known: dict, leaves: dict) -> dict:
  """Returns path -> array or shape of the parameters that the pool has; see `add`."""
  keys = {path: _key(path, known, leaf) for path, leaf in leaves.items()}
  return {path: pool[key] for path, key in keys.items() if key in pool}


def same_tower(model: vlm.ModelConfig, known: dict, other: vlm.ModelConfig, others: dict) -> bool:
  """Returns whether two models have equal vision towers, wherever their parameters are placed.

  Args:
    model, other: the architectures.
    known, others: from `identities`.
  """
  paths, other_paths = (
    [f"vision/{path}" for path in trees.flatten(vlm.abstract_params(one)[1]["vision"])]
    for one in (model, other)
  )
  same = (path in known and known[path] == others.get(path) for path in paths)
  return model.vision == other.vision and paths == other_paths and all(same)
