"""Ties a run to the weights that it started from.

Checkpoints hold trained parameters only; the frozen ones are read again from where the run took
them. What stood there then is written down, so that other weights are never taken for them.
"""

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING

import jax
from etils import epath

from vlalign_jax import storage
from vlalign_jax.errors import InputError

if TYPE_CHECKING:
  from vlalign_jax.weights.parts import ModelSource

FILE = "model/{}.json"
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def fingerprint(path: str) -> str:
  """SHA-256 of a file's size and of evenly spread samples: told in milliseconds, not minutes."""
  size = os.path.getsize(path)
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    for sample in range(_SAMPLES):
      file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
      digest.update(file.read(_SAMPLE_BYTES))
  return digest.hexdigest()


def _fingerprints(tensors: dict) -> dict[str, str]:
  return {
    path: fingerprint(path) for path in sorted({file for t in tensors.values() for file in t.files})
  }


def content(source: "ModelSource") -> dict:
  """What tells a source's weights: fingerprints of their files, and the checkpoints of runs."""
  found = {"files": _fingerprints(source.tensors), "runs": source.runs}
  if source.start:
    found["start"] = {"files": _fingerprints(source.start.tensors), "run": source.start.run}
  return found


def write(source: "ModelSource", workdir: str, name: str = "weights") -> None:
  """Writes down what a new run starts from; `name` tells its model from others that it takes."""
  if jax.process_index() == 0:
    storage.write(f"{workdir}/{FILE.format(name)}", json.dumps(content(source), indent=2))


def stored(workdir: str, name: str = "weights") -> dict | None:
  """What `write` has written down in a run directory, as of `content`; None if it has not.

  Raises:
    InputError: it is damaged.
  """
  path = epath.Path(workdir) / FILE.format(name)
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    start = found.get("start", {"files": {}, "run": None})
    return {
      "files": dict(found["files"]),
      "runs": tuple((run, int(step)) for run, step in found["runs"]),
      "start": {
        "files": dict(start["files"]),
        "run": start["run"] and (start["run"][0], int(start["run"][1])),
      },
    }
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise InputError(f"{path}: damaged; restore it, or start in a new --workdir") from error


def check(source: "ModelSource", workdir: str, name: str = "weights") -> "ModelSource":
  """The source as it was when the run in `workdir` started.

  Args:
    source: opened by the run's config.
    workdir: a run directory; one in which nothing was written down yet passes.
    name: as of `write`.

  Returns:
    The source with the checkpoints of other runs that were the newest then.

  Raises:
    InputError: a file has changed since.
  """
  then = stored(workdir, name)
  if then is None:
    return source
  files, start = then["files"], source.start
  if start:  # else a later run asks, for which all that came from there is in the checkpoints
    files |= then["start"]["files"]
    start = dataclasses.replace(start, run=then["start"]["run"])
  now = _fingerprints(source.tensors | (start.tensors if start else {}))
  changed = sorted(file for file in files | now if files.get(file) != now.get(file))
  if changed:
    raise InputError(
      f"{workdir} was started from other weights than are there now ({', '.join(changed)}); put "
      "the old ones back: the parameters that it did not train are only there"
    )
  return dataclasses.replace(source, runs=then["runs"], start=start)
