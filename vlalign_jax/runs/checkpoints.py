"""Saves, finds and restores a run's Orbax checkpoints.

A checkpoint is written under a temporary name and renamed when it is complete (in a bucket: marked
as complete), so `checkpoints/STEP` is never half-written. It holds three items: `params` (the
trained parameters only; the frozen ones are read again from the model's files), `optimizer` (the
rest of the state) and `progress` (JSON: step, data position, counters, the config, the size of the
data that all steps were planned for, the metrics of an evaluation at this step).

With several processes, all call these functions, each reads and writes its own shards, and all
resume from the same step: the newest that every process can read.
"""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from vlalign_jax import storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.optim.state import TrainState
from vlalign_jax.runs import preservation
from vlalign_jax.runs.damage import Damaged, reading

DIRECTORY = "checkpoints"
FIX = "; restore it, or move it away to use the checkpoint before"
NEWEST, BEST = "newest", "best"


def open_checkpoints(
  workdir: str,
  save_total_limit: int,
  save_best_limit: int = 0,
  metric_for_best_model: str = "eval/loss",
) -> ocp.CheckpointManager:
  """Opens the run's checkpoints; deletes leftovers of a killed save.

  Args:
    workdir: the run directory.
    save_total_limit: how many of the newest checkpoints are kept.
    save_best_limit: how many of the best are kept besides.
    metric_for_best_model: ranks them, see `preservation.rank`.
  """
  directory = epath.Path(storage.absolute(workdir)) / DIRECTORY
  policies: list[Any] = [checkpoint_managers.LatestN(save_total_limit)]
  if save_best_limit:
    best = preservation.BestEvaluated(directory, save_best_limit, metric_for_best_model)
    policies.append(best)
  return ocp.CheckpointManager(
    directory,
    item_names=("params", "optimizer", "progress"),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    ),
  )


def _without_params(state: TrainState) -> dict:
  return state.with_params(())._asdict()


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, progress: dict) -> None:
  """Starts writing a checkpoint; it is complete once `manager.wait_until_finished` returns.

  Args:
    manager: from `open_checkpoints`.
    step: of the state.
    state: what is saved.
    progress: saved as JSON; the checkpoint is ranked by its `metrics`, if it has any.
  """
  for later in manager.all_steps():
    if later >= step:  # it could not be read, and Orbax saves nothing before its newest step
      _move_damaged(manager, later)
  manager.save(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave(_without_params(state)),
      progress=ocp.args.JsonSave(progress),
    ),
    metrics=progress.get("metrics"),
  )


def _move_damaged(manager: ocp.CheckpointManager, step: int) -> None:
  """Moves a damaged checkpoint out of the way of a new one, without deleting it."""
  if jax.process_index() == 0:
    checkpoint = manager.directory / str(step)
    target = manager.directory.parent / f"{DIRECTORY}-damaged-{step}"
    while target.exists():
      target = target.parent / f"{target.name}-again"
    checkpoint.rename(target)
    logging.warning("damaged checkpoint %s moved to %s", checkpoint, target)
  multihost_utils.sync_global_devices(f"checkpoint {step} is moved")
  manager.reload()


def restore_newest(
  manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict] | None:
  """Restores the newest checkpoint that is not damaged: (state, progress); None if there is none.

  Args:
    manager: from `open_checkpoints`.
    state: TrainState of jax.ShapeDtypeStruct with shardings. Here and in `save` it may be another
      NamedTuple that has `params` and `with_params`.

  Raises:
    InputError: all checkpoints are damaged; or this process lacks the permission or the memory to
      read the newest undamaged one, or the storage fails.
  """
  steps = _steps_of_first_process(sorted(manager.all_steps(), reverse=True))
  for step in steps:
    checkpoint, error = manager.directory / str(step), None
    try:
      with reading(str(checkpoint)):
        restored = _restore(checkpoint, state)
    except Exception as caught:  # the other processes must hear of it, whatever it is
      error = caught
    failed = error is not None and not isinstance(error, Damaged)
    any_failed = _in_any_process(failed)
    if failed and error:
      raise error
    if any_failed:
      raise InputError(f"{checkpoint}: another process cannot read it; see its log")
    if not _in_any_process(error is not None):
      return restored
    logging.error("checkpoint %s", error or f"{checkpoint} cannot be read by another process")
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps} can be read; the log above says why. "
      "Restore one of them, or start in a new --workdir"
    )
  return None


def _restore(checkpoint: epath.Path, state: TrainState) -> tuple[TrainState, dict]:
  # The handlers restore, not the manager, which waits for all processes: one may fail alone.
  progress = ocp.JsonCheckpointHandler().restore(checkpoint / "progress")
  arrays = ocp.StandardCheckpointHandler()
  params = arrays.restore(checkpoint / "params", args=ocp.args.StandardRestore(state.params))
  args = ocp.args.StandardRestore(_without_params(state))
  rest = arrays.restore(checkpoint / "optimizer", args=args)
  return type(state)(**rest).with_params(params), dict(progress)


def _steps_of_first_process(steps: list[int]) -> list[int]:
  """Returns the list that process 0 passes, in every process."""
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  return multihost_utils.broadcast_one_to_all(np.resize(np.array(steps, np.int32), count)).tolist()


def _in_any_process(condition: bool) -> bool:
  """Returns whether the condition holds in at least one process."""
  return bool(multihost_utils.process_allgather(np.int32(condition)).any())


def find_run(place: str) -> tuple[str, str] | None:
  """Splits the name of a checkpoint: (run directory, "newest", "best" or a step).

  Args:
    place: RUN_DIR, RUN_DIR/checkpoints/STEP or RUN_DIR/checkpoints/best.

  Returns:
    None if there is no run at `place`.
  """
  place = place.rstrip("/")
  if epath.Path(place, DIRECTORY).is_dir():
    return place, NEWEST
  parent, _, which = place.rpartition("/")
  workdir, _, directory = parent.rpartition("/")
  if directory == DIRECTORY and epath.Path(parent).is_dir():
    return workdir or ".", which
  return None


def find_step(workdir: str, which: str, metric: str) -> int:
  """Returns the step of a complete checkpoint.

  Args:
    workdir: the run directory.
    which: "newest", "best" or a step.
    metric: ranks the best, see `preservation.rank`.

  Raises:
    InputError: there is no such checkpoint.
  """
  directory = epath.Path(storage.absolute(workdir)) / DIRECTORY
  steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
  if not steps:
    raise InputError(f"{workdir}: no finished checkpoint under {DIRECTORY}/")
  if which == NEWEST:
    return steps[-1]
  if which == BEST:
    metrics = {step: preservation.read_metrics(directory / str(step)) for step in steps}
    best = preservation.rank(metrics, metric)
    if not best:
      raise InputError(
        f"{workdir}: none of the checkpoints {steps} was saved with {metric}; name one of them, "
        f"such as {workdir}/{DIRECTORY}/{steps[-1]} (config.save_best_limit keeps the best ones)"
      )
    return best[0]
  if not which.isdigit() or int(which) not in steps:
    raise InputError(f"{workdir}: no finished checkpoint {which!r}; there are {steps}")
  return int(which)


def trained_paths(workdir: str, step: int) -> list[str]:
  """Returns the paths of a checkpoint's parameters; raises the InputErrors of `restore_params`."""
  return list(_read_metadata(epath.Path(storage.absolute(workdir)) / DIRECTORY / str(step)))


def _read_metadata(checkpoint: epath.Path) -> dict:
  """Returns path -> Orbax's metadata (shape, dtype) of the parameters in a checkpoint."""
  with reading(str(checkpoint), FIX):
    return trees.flatten(ocp.PyTreeCheckpointHandler().metadata(checkpoint / "params").tree)


def restore_params(workdir: str, step: int, leaves: dict, placement: dict) -> dict[str, jax.Array]:
  """Reads trained parameters of a run, without the rest of its state, straight into their shards.

  Args:
    workdir: the run directory.
    step: of the checkpoint.
    leaves: path -> jax.ShapeDtypeStruct of the parameters to read.
    placement: path -> sharding.

  Returns:
    path -> array, for the parameters in `leaves` that the checkpoint has.

  Raises:
    InputError: the checkpoint cannot be read, or has a parameter of another shape.
  """
  checkpoint = epath.Path(storage.absolute(workdir)) / DIRECTORY / str(step)
  directory, item = checkpoint / "params", {}
  for path, metadata in _read_metadata(checkpoint).items():
    if path not in leaves:
      continue
    leaf, shape = leaves[path], tuple(metadata.shape)
    if shape != leaf.shape:
      raise InputError(f"{directory}: {path} is {shape}, the model has {leaf.shape}")
    item[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement[path])
  if not item:
    return {}
  item = trees.unflatten(item)
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  with reading(str(checkpoint), FIX):
    return trees.flatten(ocp.PyTreeCheckpointHandler().restore(directory, args=args))
