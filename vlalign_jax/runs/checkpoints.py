"""Orbax checkpoints of a run: what moves, how far the data is, and where to go on.

A checkpoint is written beside its place and renamed when whole (in a bucket: marked when whole), so
that what counts as `checkpoints/STEP` is complete. It holds three items: `params` (the trained
parameters only; the frozen ones are read from where the run took them), `optimizer` (everything
else of the state) and `progress` (JSON: step, data position, counters, the config, what the whole
run was planned for, the metrics of an evaluation at this step).

With several processes, all call these functions, each reads and writes its own shards, and all go
on from the same step: one that no process fails to read.
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vlalign_jax import storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.optim.state import TrainState
from vlalign_jax.runs import preservation
from vlalign_jax.runs.damage import Damaged, reading

DIRECTORY = "checkpoints"
MEND = "; restore it, or move it away to use the checkpoint before"
NEWEST, BEST = "newest", "best"


def open_checkpoints(
  workdir: str,
  save_total_limit: int,
  save_best_limit: int = 0,
  metric_for_best_model: str = "eval/loss",
) -> ocp.CheckpointManager:
  """The run's checkpoints; leftovers of a killed save go.

  Args:
    workdir: the run directory.
    save_total_limit: how many of the newest stay.
    save_best_limit: how many of the best stay, besides.
    metric_for_best_model: what makes the best, see `preservation.HIGHER_IS_BETTER`.
  """
  directory = epath.Path(storage.absolute(workdir)) / DIRECTORY
  return ocp.CheckpointManager(
    directory,
    item_names=("params", "optimizer", "progress"),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=preservation.NewestAndBest(
        directory, save_total_limit, save_best_limit, metric_for_best_model
      ),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    ),
  )


def _without_params(state: TrainState) -> dict:
  return state.with_params(())._asdict()


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, progress: dict) -> None:
  """Starts writing a checkpoint; it is whole once `manager.wait_until_finished` returns.

  Args:
    manager: from `open_checkpoints`.
    step: of the state.
    state: what is to be saved.
    progress: goes through JSON; `metrics`, where it has them, decide whether this is a best one.
  """
  for later in manager.all_steps():
    if later >= step:  # it could not be read, and Orbax saves nothing before its newest step
      _set_aside(manager, later)
  manager.save(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave(_without_params(state)),
      progress=ocp.args.JsonSave(progress),
    ),
    metrics=progress.get("metrics"),
  )


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
  """Makes room where a damaged checkpoint stands, without deleting it."""
  if jax.process_index() == 0:
    place = manager.directory / str(step)
    name = f"{DIRECTORY}-damaged-{step}"
    while (manager.directory.parent / name).exists():
      name += "-again"
    place.rename(manager.directory.parent / name)
    logging.warning("damaged checkpoint %s moved to %s", place, manager.directory.parent / name)
  multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
  manager.reload()


def restore_newest(
  manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict] | None:
  """The newest state that is not damaged, and its progress; None if nothing was ever saved.

  Args:
    manager: from `open_checkpoints`.
    state: TrainState of jax.ShapeDtypeStruct with shardings: what is wanted, and where. Another
      NamedTuple with `params` and `with_params` will do as well, here and in `save`.

  Raises:
    InputError: all checkpoints are damaged; or the newest that is not cannot be read for want of
      rights or memory, or because the storage fails.
  """
  steps = _of_first_process(sorted(manager.all_steps(), reverse=True))
  for step in steps:
    place, error = manager.directory / str(step), None
    try:
      with reading(str(place)):
        found = _restore(place, state)
    except Exception as caught:  # the other processes must hear of it, whatever it is
      error = caught
    failed = error is not None and not isinstance(error, Damaged)
    if _anywhere(failed):
      raise error if failed else InputError(f"{place}: another process cannot read it; see its log")
    if not _anywhere(error is not None):
      return found
    logging.error("checkpoint %s", error or f"{place} cannot be read by another process")
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps} can be read; the log above says why. "
      "Restore one of them, or start in a new --workdir"
    )
  return None


def _restore(place: epath.Path, state: TrainState) -> tuple[TrainState, dict]:
  # By the handlers, not the manager: that one waits for all processes, and one may fail alone.
  progress = ocp.JsonCheckpointHandler().restore(place / "progress")
  arrays = ocp.StandardCheckpointHandler()
  params = arrays.restore(place / "params", args=ocp.args.StandardRestore(state.params))
  rest = arrays.restore(place / "optimizer", args=ocp.args.StandardRestore(_without_params(state)))
  return type(state)(**rest).with_params(params), progress


def _of_first_process(steps: list[int]) -> list[int]:
  """The list as process 0 has it."""
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  return multihost_utils.broadcast_one_to_all(np.resize(np.array(steps, np.int32), count)).tolist()


def _anywhere(condition: bool) -> bool:
  """Whether it holds in any process."""
  return bool(multihost_utils.process_allgather(np.int32(condition)).any())


def find_run(place: str) -> tuple[str, str] | None:
  """What a place names: (run directory, "newest", "best" or a step); None if it is no run.

  Args:
    place: RUN_DIR, RUN_DIR/checkpoints/STEP or RUN_DIR/checkpoints/best.
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
  """The step of a whole checkpoint.

  Args:
    workdir: the run directory.
    which: "newest", "best" or a step.
    metric: what makes the best, see `preservation.HIGHER_IS_BETTER`.

  Raises:
    InputError: there is none.
  """
  directory = epath.Path(storage.absolute(workdir)) / DIRECTORY
  steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
  if not steps:
    raise InputError(f"{workdir}: no finished checkpoint under {DIRECTORY}/")
  if which == NEWEST:
    return steps[-1]
  if which == BEST:
    metrics = {step: preservation.metrics_of(directory / str(step)) for step in steps}
    best = preservation.ranked(metrics, metric)
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
  """Paths of the parameters in a checkpoint; raises the InputErrors of `restore_params`."""
  return list(_stored_params(epath.Path(storage.absolute(workdir)) / DIRECTORY / str(step)))


def _stored_params(checkpoint: epath.Path) -> dict:
  with reading(str(checkpoint), MEND):
    return trees.flatten(ocp.PyTreeCheckpointHandler().metadata(checkpoint / "params").tree)


def restore_params(workdir: str, step: int, leaves: dict, placement: dict) -> dict[str, jax.Array]:
  """The trained parameters of a run, and nothing else, straight into their shards.

  Args:
    workdir: the run directory.
    step: of the checkpoint.
    leaves: path -> jax.ShapeDtypeStruct of what is wanted.
    placement: path -> sharding.

  Returns:
    path -> array, for the wanted parameters that the checkpoint has.

  Raises:
    InputError: the checkpoint cannot be read, or has one of another shape.
  """
  checkpoint = epath.Path(storage.absolute(workdir)) / DIRECTORY / str(step)
  place = checkpoint / "params"
  handler = ocp.PyTreeCheckpointHandler()
  item = {}
  for path, meta in _stored_params(checkpoint).items():
    if path not in leaves:
      continue
    leaf = leaves[path]
    if tuple(meta.shape) != leaf.shape:
      raise InputError(f"{place}: {path} is {tuple(meta.shape)}, the model has {leaf.shape}")
    item[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement[path])
  if not item:
    return {}
  item = trees.unflatten(item)
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  with reading(str(checkpoint), MEND):
    return trees.flatten(handler.restore(place, args=args))
