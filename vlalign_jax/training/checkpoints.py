"""Orbax checkpoints of a run: what moves, how far the data is, and where to go on.

A checkpoint is written beside its place and renamed when whole, so that what stands under
`checkpoints/STEP` is complete. It holds three items: `params` (the trained parameters only; the
frozen ones are read from where the run took them), `optimizer` (everything else of the state) and
`progress` (JSON: step, data position, counters).
"""

import os

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.training.state import TrainState


def open_checkpoints(workdir: str, keep: int) -> ocp.CheckpointManager:
  """The run's checkpoints, of which the `keep` newest stay; leftovers of a killed save go."""
  return ocp.CheckpointManager(
    os.path.join(os.path.abspath(workdir), "checkpoints"),
    item_names=("params", "optimizer", "progress"),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    ),
  )


def _without_params(state: TrainState):
  return state._replace(params=())._asdict()


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, progress: dict) -> None:
  """Starts writing a checkpoint; it is whole once `manager.wait_until_finished` returns."""
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
  )


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
  """Makes room where a damaged checkpoint stands, without deleting it."""
  place = os.path.join(manager.directory, str(step))
  aside = f"{manager.directory}-damaged-{step}"
  while os.path.exists(aside):
    aside += "-again"
  if jax.process_index() == 0:
    os.rename(place, aside)
    logging.warning("damaged checkpoint %s moved to %s", place, aside)
  manager.reload()


def restore_newest(
  manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict] | None:
  """The newest state that can be read, and its progress; None if nothing was ever saved.

  Args:
    manager: from `open_checkpoints`.
    state: TrainState of jax.ShapeDtypeStruct with shardings: what is wanted, and where.

  Raises:
    InputError: there are checkpoints, but none can be read.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for step in steps:
    try:
      found = manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(state.params),
          optimizer=ocp.args.StandardRestore(_without_params(state)),
          progress=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # whatever a damaged file makes Orbax or tensorstore raise
      reason = " ".join(str(error).split())[:300]
      logging.error("checkpoint %s/%d cannot be read: %s", manager.directory, step, reason)
      continue
    return TrainState(**{**found.optimizer, "params": found.params}), found.progress
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps} can be read; the log above says why. "
      "Remove the directory to start over, or resume with the config that wrote them"
    )
  return None


def newest_step(workdir: str) -> int:
  """The newest whole checkpoint of a run directory.

  Raises:
    InputError: there is none.
  """
  directory = os.path.join(workdir, "checkpoints")
  steps = ocp.utils.checkpoint_steps(directory) if os.path.isdir(directory) else []
  if not steps:
    raise InputError(f"{workdir}: no finished checkpoint under checkpoints/")
  return max(steps)


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
    InputError: the checkpoint has one of another shape.
  """
  place = epath.Path(os.path.abspath(workdir)) / "checkpoints" / str(step) / "params"
  handler = ocp.PyTreeCheckpointHandler()
  stored = trees.flatten(handler.metadata(place).tree)
  item = {}
  for path, meta in stored.items():
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
  return trees.flatten(handler.restore(place, args=args))
