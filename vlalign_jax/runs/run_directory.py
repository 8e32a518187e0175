"""Makes a run directory, and checks it against the config that a run is resumed with."""

import json
import time

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vlalign_jax import config as configs
from vlalign_jax import storage, trees
from vlalign_jax.config_checks import Config
from vlalign_jax.errors import InputError

# Keys that may change when a run is resumed: they change neither what it has computed so far nor
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
  "data.max_bad_records",
  "data.cache",
  "model.architecture",
  "ppo.log_samples_every",
  "ppo.log_samples",
  "log.writers",
  "log.project",
  "log.name",
)
# These may change as well, since a run may need it to fit on other devices. They change the order
# of sums, and so the last bits. Micro-batches are weighted by their tokens, so their number changes
# no more than that.
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
  "ppo.sampling_mesh",
  "ppo.sample_parts",
  "ppo.slots",
)


def open_run(workdir: str, config: Config, defaults: Config | None = None) -> bool:
  """Makes the directory and its config.json, or checks that the run there has the same config.

  Args:
    workdir: the run directory.
    config: of the run.
    defaults: of its stage, for keys that a run's config.json lacks as it is older than they are.

  Returns:
    Whether there is a run to resume; one that has saved nothing starts again, with any config.

  Raises:
    InputError: the directory is missing from the command, cannot be written to, or has a
      config.json of a run with another config, of another version or of no run; or the processes do
      not see the same directory.
  """
  if not workdir:
    raise InputError("--workdir is missing: the directory that this run is written to")
  storage.check(workdir, "--workdir")
  directory = epath.Path(workdir)
  path = directory / "config.json"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    stored = stored_config(workdir, defaults) if path.exists() else None
    resumes = has_saved(directory)
    if stored and resumes:
      _check_config(stored, config, workdir)
    _check_shared(directory)
    if jax.process_index() == 0:
      storage.write(str(path), json.dumps(config.to_dict(), indent=2) + "\n")
  except Exception as error:
    if isinstance(error, InputError) or not (isinstance(error, OSError) or storage.is_url(workdir)):
      raise
    reason = getattr(error, "strerror", None) or error  # a bucket's library has errors of its own
    raise InputError(f"--workdir {workdir} cannot be written to: {reason}") from error
  return resumes


def _check_shared(directory: epath.Path) -> None:
  """Refuses a directory that is not the same one for all processes, and waits for all of them."""
  if jax.process_count() == 1:
    return
  # A new name: a file system may remember that a file which was looked for before was missing.
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
  """Returns whether the run there has saved a checkpoint to resume from."""
  steps = directory / "checkpoints"
  return steps.is_dir() and any(step.name.isdigit() for step in steps.iterdir())


def stored_config(directory: str, defaults: Config | None = None) -> dict:
  """Reads the config of a run directory; keys that it lacks get their defaults.

  Args:
    directory: of the run.
    defaults: of the run's stage; None: only the keys that all stages have are checked and added.

  Raises:
    InputError: its config.json is missing or damaged, is not a run's, or has keys that this version
      does not have.
  """
  path = epath.Path(directory) / "config.json"
  try:
    stored = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(
      f"{path} cannot be read as JSON ({error}); restore it, or name another directory"
    ) from error
  if not isinstance(stored, dict) or "stage" not in stored:
    raise InputError(f"{path} is not the config of a run; name another directory")
  return _complete(stored, path, defaults)


def _complete(stored: dict, where: str | epath.Path, defaults: Config | None) -> dict:
  """Returns a stored config with the defaults of keys that were added since it was written.

  Raises:
    InputError: the version that wrote it had other names for the keys.
  """
  known = (defaults or configs.shared()).to_dict()
  groups = {
    name for name in stored if defaults or name in known or not isinstance(stored[name], dict)
  }
  known, stored = trees.flatten(known), trees.flatten(stored)
  unknown = sorted(
    path.replace("/", ".")
    for path in stored.keys() - known.keys() - {"stage"}
    if path.split("/")[0] in groups
  )
  if unknown:
    raise InputError(
      f"{where} was written by an earlier version (or a later one), whose keys had other names: "
      f"{', '.join(unknown)}; export the run with that version, or start again in a new directory"
    )
  return trees.unflatten(known | stored)


def _check_config(stored: dict, config: Config, workdir: str) -> list[str]:
  """Refuses keys that differ and are not in HARMLESS; returns those that change the rounding."""
  stored, now = (
    {path.replace("/", "."): value for path, value in trees.flatten(values).items()}
    for values in (stored, config.to_dict())
  )
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
  config: Config,
  plan: dict,
  workdir: str,
  defaults: Config | None = None,
) -> None:
  """Refuses to resume a checkpoint with another config or other data.

  Args:
    progress: of the checkpoint. Its `plan` has `steps` and `records`, and `examples`, a checksum of
      the order and the lengths of the records: schedules and the order span all steps. Its `config`
      is the one that computed it, and is there even if config.json is lost.
    config: of this command.
    plan: of this command.
    workdir: the run directory.

  Raises:
    InputError: they differ.
  """
  stored = progress.get("config", config.to_dict())
  stored = _complete(stored, f"the checkpoint in {workdir}", defaults)
  if rounding := _check_config(stored, config, workdir):
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
  """Returns the lines of metrics.jsonl up to a step, without a half-written last one.

  A run that starts again at step 0 keeps none: it writes the line of step 0 again.
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
