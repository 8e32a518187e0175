"""The directory of a prediction: its config and inputs, and a line for each answer."""

import contextlib
import json
import math
import os
from collections.abc import Iterator

from vlalign_jax import json_lines, storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.prediction import settings

PREDICTIONS, INPUTS, CONFIG = "predictions.jsonl", "inputs.json", "config.json"
REWARDS = "rewards.jsonl"  # scores, until all are there
# Keys that may change when a prediction resumes: answers depend on them only by rounding.
_HARMLESS = (
  "batch_size",
  "gallery",
  "generation.sampling_mesh",
  "log.writers",
  "log.project",
  "log.name",
  "data.workers",
  "data.max_bad_records",
  "data.cache",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
)


def open_directory(workdir: str, config, inputs: dict) -> None:
  """Makes the directory, or checks that its lines are of the same config, models and records.

  Args:
    workdir: the directory.
    config: of this command.
    inputs: config key -> JSON value that identifies the content that the key names.

  Raises:
    InputError: it cannot be used, or has lines of another config or other inputs.
  """
  if not workdir:
    raise InputError("--workdir is missing: the directory that predictions are written to")
  if storage.is_url(workdir):
    raise InputError(
      f"--workdir {workdir}: predictions are written line by line, which buckets do not support; "
      "give a local directory and copy it"
    )
  try:
    os.makedirs(workdir, exist_ok=True)
    stored = _read(workdir, CONFIG)
    if stored is not None:
      _check_stage(stored, workdir)
    if read_lines(os.path.join(workdir, PREDICTIONS)):
      _check_same(workdir, stored or {}, config.to_dict(), inputs)
    elif os.path.exists(rewards := os.path.join(workdir, REWARDS)):
      os.remove(rewards)  # its answers no longer exist
    storage.write(os.path.join(workdir, CONFIG), json.dumps(config.to_dict(), indent=2) + "\n")
    storage.write(os.path.join(workdir, INPUTS), json.dumps(inputs, indent=2) + "\n")
  except OSError as error:
    raise InputError(f"--workdir {workdir} cannot be written to: {error.strerror}") from error


def _read(workdir: str, name: str):
  path = os.path.join(workdir, name)
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); choose another --workdir") from error


def _check_stage(stored, workdir: str) -> None:
  stage = stored.get("stage") if isinstance(stored, dict) else None
  if stage != settings.STAGE:
    raise InputError(
      f"{workdir} has a run of the stage {stage!r}; choose another --workdir for predictions"
    )


def _check_same(workdir: str, stored: dict, config: dict, inputs: dict) -> None:
  before, now = (
    {path.replace("/", "."): value for path, value in trees.flatten(values).items()}
    for values in (stored, config)
  )
  changes = [
    f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and key not in _HARMLESS
  ]
  if changes:
    raise InputError(
      f"{workdir} has predictions of another config ({'; '.join(changes)}); repeat its command to "
      "resume, or choose another --workdir"
    )
  before = _read(workdir, INPUTS)
  for key, value in json.loads(json.dumps(inputs)).items():
    if not isinstance(before, dict) or before.get(key) != value:
      raise InputError(
        f"{workdir} has predictions with another content of config.{key} than is there now; "
        "restore it (of a run, name RUN_DIR/checkpoints/STEP), or choose another --workdir"
      )


def read_lines(path: str) -> list[dict]:
  """Returns the lines of a file of predictions, see `json_lines.read`."""
  return json_lines.read(path, "record", "delete this line, and it is computed again")


def write_lines(path: str, lines: list[dict]) -> None:
  """Writes a file at once: if the process dies, it has its old or its new content."""
  storage.write(path, "".join(_as_line(line) for line in lines))


@contextlib.contextmanager
def append_lines(path: str) -> Iterator:
  """Yields a function that appends a line to a file and flushes it."""
  with open(path, "a", encoding="utf-8") as file:

    def append(line: dict) -> None:
      file.write(_as_line(line))
      file.flush()

    yield append


def number(value) -> float | None:
  """Returns a number for JSON; None if it is not finite."""
  return float(value) if math.isfinite(value) else None


def _as_line(line: dict) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
