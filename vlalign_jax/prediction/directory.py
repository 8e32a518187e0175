"""The directory of a prediction: what it was asked, and a line for each answer as it comes."""

import contextlib
import json
import math
import os
from collections.abc import Iterator

from vlalign_jax import storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.prediction import settings

PREDICTIONS, INPUTS, CONFIG = "predictions.jsonl", "inputs.json", "config.json"
REWARDS = "rewards.jsonl"  # scores of predictions while they come
# What may change before a prediction goes on: no answer depends on it, but for rounding.
_HARMLESS = (
  "batch_size",
  "gallery",
  "generation.gather",
  "data.workers",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
)


def open_directory(workdir: str, config, inputs: dict) -> None:
  """Makes the directory, or checks that what is there was asked of the same models and records.

  Args:
    workdir: the directory.
    config: of this command.
    inputs: name -> what tells it from another one, as JSON has it.

  Raises:
    InputError: it cannot be used, or has lines of another config or other inputs.
  """
  if not workdir:
    raise InputError("--workdir is missing: the directory that predictions are written to")
  if storage.is_url(workdir):
    raise InputError(
      f"--workdir {workdir}: predictions are written line by line, which buckets do not do; give "
      "a directory of this machine and copy it"
    )
  try:
    os.makedirs(workdir, exist_ok=True)
    stored = _read(workdir, CONFIG)
    if stored is not None:
      _check_stage(stored, workdir)
    if read_lines(os.path.join(workdir, PREDICTIONS)):
      _check_same(workdir, stored or {}, config.to_dict(), inputs)
    elif os.path.exists(rewards := os.path.join(workdir, REWARDS)):
      os.remove(rewards)  # of answers that are gone
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
      f"{workdir} holds a run of the stage {stage!r}; choose another --workdir for predictions"
    )


def _check_same(workdir: str, stored: dict, now: dict, inputs: dict) -> None:
  then, now = (
    {path.replace("/", "."): value for path, value in trees.flatten(values).items()}
    for values in (stored, now)
  )
  differing = [
    f"{key}: {then.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(then.keys() | now.keys())
    if then.get(key) != now.get(key) and key not in _HARMLESS
  ]
  if differing:
    raise InputError(
      f"{workdir} holds predictions of another config ({'; '.join(differing)}); repeat its command "
      "to go on, or choose another --workdir"
    )
  before = _read(workdir, INPUTS)
  now = json.loads(json.dumps(inputs))
  changed = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
  if changed:
    raise InputError(
      f"{workdir} holds predictions with another content of config.{changed[0]} than is there now; "
      "restore it (of a run, name RUN_DIR/checkpoints/STEP), or choose another --workdir"
    )


def read_lines(path: str) -> list[dict]:
  """The lines of a file, without a half-written last one; none if there is no file.

  Raises:
    InputError: a line before the last is damaged.
  """
  try:
    with open(path, "rb") as file:
      content = file.read()
  except FileNotFoundError:
    return []
  lines = content.split(b"\n")
  found = []
  for number, line in enumerate(lines[:-1], start=1):
    try:
      found.append(json.loads(line))
      if not (isinstance(found[-1], dict) and isinstance(found[-1].get("record"), int)):
        raise ValueError("no object with the number of a record")
    except ValueError as error:
      raise InputError(
        f"{path}, line {number}: damaged ({error}); delete this line, and it is computed again"
      ) from error
  return found


def write_lines(path: str, lines: list[dict]) -> None:
  """Writes a whole file, which has its old or its new content whenever the process dies."""
  storage.write(path, "".join(_as_line(line) for line in lines))


@contextlib.contextmanager
def appended(path: str) -> Iterator:
  """A function that adds a line to a file, which is there for readers at once."""
  with open(path, "a", encoding="utf-8") as file:

    def add(line: dict) -> None:
      file.write(_as_line(line))
      file.flush()

    yield add


def number(value) -> float | None:
  """A number as JSON can say it; None for what is not finite."""
  return float(value) if math.isfinite(value) else None


def _as_line(line: dict) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
