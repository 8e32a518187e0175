"""Records the weights that a run starts from, and checks that they are still the same.

Checkpoints hold trained parameters only; the frozen ones are read again from the files that the run
started from. A run that is resumed or exported is refused if these files have changed.
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
  """Returns the SHA-256 of a file's size and of evenly spaced samples: it takes milliseconds."""
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
  """Returns what identifies a source's weights: fingerprints of files, and checkpoints of runs."""
  record = {"files": _fingerprints(source.tensors), "runs": source.runs}
  if source.start:
    record["start"] = {"files": _fingerprints(source.start.tensors), "run": source.start.run}
  return record


def write(source: "ModelSource", workdir: str, name: str = "weights") -> None:
  """Records the weights that a new run starts from; `name`: which of its models this is."""
  if jax.process_index() == 0:
    storage.write(f"{workdir}/{FILE.format(name)}", json.dumps(content(source), indent=2))


def stored(workdir: str, name: str = "weights") -> dict | None:
  """Returns the record that `write` made in a run directory, see `content`; None if there is none.

  Raises:
    InputError: it is damaged.
  """
  path = epath.Path(workdir) / FILE.format(name)
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text())
    start = record.get("start", {"files": {}, "run": None})
    return {
      "files": dict(record["files"]),
      "runs": tuple((run, int(step)) for run, step in record["runs"]),
      "start": {
        "files": dict(start["files"]),
        "run": start["run"] and (start["run"][0], int(start["run"][1])),
      },
    }
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise InputError(f"{path}: damaged; restore it, or start in a new --workdir") from error


def check(source: "ModelSource", workdir: str, name: str = "weights") -> "ModelSource":
  """Checks that the files of a source are those that the run in `workdir` started from.

  Args:
    source: opened by the run's config.
    workdir: a run directory; it passes if it has no record yet.
    name: see `write`.

  Returns:
    The source with the checkpoints of other runs that the run started from, and not newer ones.

  Raises:
    InputError: a file has changed since.
  """
  record = stored(workdir, name)
  if record is None:
    return source
  files, start = record["files"], source.start
  if start:  # a source without `start` takes the adapters from the run's checkpoints
    files |= record["start"]["files"]
    start = dataclasses.replace(start, run=record["start"]["run"])
  now = _fingerprints(source.tensors | (start.tensors if start else {}))
  changed = sorted(file for file in files | now if files.get(file) != now.get(file))
  if changed:
    raise InputError(
      f"{workdir} was started from other weights than are there now ({', '.join(changed)}); put "
      "the old ones back: only they have the parameters that the run did not train"
    )
  return dataclasses.replace(source, runs=record["runs"], start=start)
