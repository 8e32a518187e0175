"""A run directory: made, checked against the config that is resumed with, and written to."""

import json
import time

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vlalign_jax import storage, trees
from vlalign_jax.errors import InputError

# What may change between a run and its resumption without changing what it computed so far, nor
# which examples a step learns from.
HARMLESS = (
  "log_every",
  "eval_every",
  "save_every",
  "save_total_limit",
  "save_best_limit",
  "metric_for_best_model",
  "data.workers",
  "data.on_bad_record",
  "model.architecture",
  "ppo.log_samples_every",
  "ppo.log_samples",
)
# These change the order of sums besides, and so the last bits: a run may need them to fit on other
# devices. Micro-batches are weighted by their tokens, so their number changes no more than that.
ROUNDING = (
  "grad_accumulation",
  "model.remat",
  "mesh.zero_stage",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "mesh.offload_optimizer",
  "ppo.actor_zero_stage",
  "ppo.critic_zero_stage",
  "ppo.gather",
  "ppo.sample_parts",
)


def open_run(workdir: str, config: ConfigDict, defaults: ConfigDict | None = None) -> bool:
  """Makes the directory and its config.json, or checks that a run there has the same config.

  Args:
    workdir: the run directory.
    config: of the run.
    defaults: of its stage, for keys that a run's config.json lacks as it is older than they are.

  Returns:
    Whether there is a run to go on with; one that has saved nothing begins anew, with any config.

  Raises:
    InputError: the directory is none or cannot be written to, holds a run with another config, or
      a config.json that is no run's; or the processes do not see the same directory.
  """
  if not workdir:
    raise InputError("--workdir is missing: the directory that this run is written to")
  storage.check(workdir, "--workdir")
  directory = epath.Path(workdir)
  path = directory / "config.json"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    stored = _read_config(path) if path.exists() else None
    resumes = has_saved(directory)
    if stored and resumes:
      _check_config(stored, config, workdir, defaults)
    _check_shared(directory)
    if jax.process_index() == 0:
      storage.write(str(path), json.dumps(config.to_dict(), indent=2) + "\n")
  except InputError:
    raise
  except Exception as error:
    if not isinstance(error, OSError) and not storage.is_url(workdir):
      raise
    reason = getattr(error, "strerror", None) or error  # libraries of buckets have their own errors
    raise InputError(f"--workdir {workdir} cannot be written to: {reason}") from error
  return resumes


def _check_shared(directory: epath.Path) -> None:
  """Refuses a directory that is not the same one for all processes, and waits for all of them."""
  if jax.process_count() == 1:
    return
  # A name that no process has ever looked for, so that no file system remembers its absence.
  number = int(multihost_utils.broadcast_one_to_all(np.uint32(time.time_ns() % 2**32)))
  probe = directory / f"shared-{number}"
  if jax.process_index() == 0:
    storage.write(str(probe), "")
  multihost_utils.sync_global_devices("the probe is written")
  seen = multihost_utils.process_allgather(np.int32(probe.exists()))
  if jax.process_index() == 0:
    probe.unlink()
  if not seen.all():
    raise InputError(
      f"--workdir {directory} is not the same directory for all processes; give one that all "
      "hosts share"
    )


def has_saved(directory: epath.Path) -> bool:
  """Whether the run there has saved a checkpoint to go on from."""
  steps = directory / "checkpoints"
  return steps.is_dir() and any(step.name.isdigit() for step in steps.iterdir())


def _read_config(path: epath.Path) -> dict:
  try:
    stored = json.loads(path.read_text())
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); restore it or choose another --workdir") from (
      error
    )
  if not isinstance(stored, dict) or "stage" not in stored:
    raise InputError(f"{path} is not the config of a run; choose another --workdir")
  return stored


def stored_config(directory: str) -> dict:
  """The config of a run directory.

  Raises:
    InputError: its config.json is missing or damaged.
  """
  path = epath.Path(directory) / "config.json"
  try:
    stored = json.loads(path.read_text())
    stored["stage"]
    return stored
  except (OSError, ValueError, KeyError) as error:
    raise InputError(f"{path}: no readable config of a run: {error}") from error


def _check_config(
  stored: dict, config: ConfigDict, workdir: str, defaults: ConfigDict | None
) -> list[str]:
  """Refuses keys that differ and are not known to be harmless; gives those that cost rounding."""
  known, stored, now = (
    {path.replace("/", "."): value for path, value in trees.flatten(values).items()}
    for values in (defaults.to_dict() if defaults else {}, stored, config.to_dict())
  )
  stored = known | stored
  differing = {
    key: f"{key}: {stored.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(stored.keys() | now.keys())
    if stored.get(key) != now.get(key) and key not in HARMLESS
  }
  harmless = set(ROUNDING)
  if config.lora.dropout:  # each micro-batch draws its own
    harmless.remove("grad_accumulation")
  rounding = [differing.pop(key) for key in ROUNDING if key in differing and key in harmless]
  if differing:
    raise InputError(
      f"{workdir} holds a run with another config ({'; '.join(differing.values())}); repeat its "
      "command to resume, or choose another --workdir"
    )
  return rounding


def check_progress(
  progress: dict,
  config: ConfigDict,
  plan: dict,
  workdir: str,
  defaults: ConfigDict | None = None,
) -> None:
  """Refuses to go on from a checkpoint with another config or other data.

  Args:
    progress: of the checkpoint. Its `plan` has `steps` and `records`, and `examples`, a checksum of
      which records come when and how long they are: schedules and the order of records span the
      whole run. Its `config` is what it was computed by, if there is no config.json left, too.
    config: of this command.
    plan: of this command.
    workdir: the run directory.

  Raises:
    InputError: they differ.
  """
  rounding = _check_config(progress.get("config", config.to_dict()), config, workdir, defaults)
  if rounding:
    logging.info("from here on the same up to rounding only (%s)", "; ".join(rounding))
  stored, now = progress["plan"], plan
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


def metrics_until(path: epath.Path, step: int) -> str:
  """The lines of metrics.jsonl up to a step, without a half-written last one.

  A run that begins anew, at step 0, keeps none: it writes that of step 0 again.
  """
  if not step:
    return ""
  kept = []
  for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
    try:
      if json.loads(line)["step"] <= step and line.endswith("\n"):
        kept.append(line)
    except ValueError:
      break
  return "".join(kept)
