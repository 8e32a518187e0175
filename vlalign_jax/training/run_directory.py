"""A run directory: made, checked against the config that is resumed with, and written to."""

import json
import os

import jax
from ml_collections import ConfigDict

from vlalign_jax import trees
from vlalign_jax.errors import InputError

# What may change between a run and its resumption without changing what it computed so far.
HARMLESS = (
  "log_every",
  "eval_every",
  "save_every",
  "keep",
  "data.workers",
  "data.on_bad_record",
  "model.remat",
  "mesh.zero_stage",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
)


def write_atomically(path: str, text: str) -> None:
  """The file has either its old or its new content, whenever the process dies."""
  partial = f"{path}.partial"
  with open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def open_run(workdir: str, config: ConfigDict) -> bool:
  """Makes the directory and its config.json, or checks that a run there has the same config.

  Returns:
    Whether there is a run to go on with; one that has saved nothing begins anew, with any config.

  Raises:
    InputError: the directory is none or cannot be written to, holds a run with another config, or
      a config.json that is no run's.
  """
  if not workdir:
    raise InputError("--workdir is missing: the directory that this run is written to")
  if "://" in workdir:
    raise InputError(
      f"--workdir {workdir} is a URL, which is not supported yet; mount the storage and give the "
      "path there"
    )
  path = os.path.join(workdir, "config.json")
  try:
    os.makedirs(workdir, exist_ok=True)
    stored = _read_config(path) if os.path.isfile(path) else None
    resumes = _has_saved(workdir)
    if stored and resumes:
      _check_same(stored, config.to_dict(), workdir)
    if jax.process_index() == 0:
      write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")
  except OSError as error:
    raise InputError(f"--workdir {workdir} cannot be written to: {error.strerror}") from error
  return resumes


def _has_saved(workdir: str) -> bool:
  steps = os.path.join(workdir, "checkpoints")
  return os.path.isdir(steps) and any(name.isdigit() for name in os.listdir(steps))


def _read_config(path: str) -> dict:
  try:
    with open(path, encoding="utf-8") as file:
      stored = json.load(file)
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); restore it or choose another --workdir") from (
      error
    )
  if not isinstance(stored, dict) or "stage" not in stored:
    raise InputError(f"{path} is not the config of a run; choose another --workdir")
  return stored


def _check_same(stored: dict, now: dict, workdir: str) -> None:
  stored, now = (
    {path.replace("/", "."): value for path, value in trees.flatten(config).items()}
    for config in (stored, now)
  )
  differing = [
    f"{key}: {stored.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(stored.keys() | now.keys())
    if stored.get(key) != now.get(key) and key not in HARMLESS
  ]
  if differing:
    raise InputError(
      f"{workdir} holds a run with another config ({'; '.join(differing)}); repeat its command to "
      "resume, or choose another --workdir"
    )


def check_plan(stored: dict, now: dict, workdir: str) -> None:
  """Refuses to go on with other data: schedules and the order of records span the whole run.

  Args:
    stored: the plan of the newest checkpoint: its `steps` and `records`, and `examples`, a
      checksum of which records come when and how long they are.
    now: the same of this command.
    workdir: the run directory.

  Raises:
    InputError: they differ.
  """
  if stored == now:
    return
  counts = [
    f"{stored[key]} {key} then, {now[key]} now"
    for key in ("steps", "records")
    if stored[key] != now[key]
  ]
  raise InputError(
    f"{workdir}: the training data is not what the run was planned for "
    f"({'; '.join(counts) or 'as many records, but others, or of other lengths'}); restore the "
    "files of data.train, or start in a new --workdir"
  )


def truncate_metrics(path: str, step: int) -> None:
  """Drops lines after `step` (and a half-written last one), which a resumed run writes again."""
  if not os.path.isfile(path):
    return
  kept = []
  with open(path, encoding="utf-8") as file:
    for line in file:
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line)
      except ValueError:
        break
  write_atomically(path, "".join(kept))
