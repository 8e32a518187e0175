"""Orbax checkpoints of a run: what moves, how far the data is, and where to go on.

A checkpoint is written beside its place and renamed when whole, so that what stands under
`checkpoints/STEP` is complete. It holds three items: `params` (the trained parameters only; the
frozen ones are read from where the run took them), `optimizer` (everything else of the state) and
`progress` (JSON: step, data position, counters, what the whole run was planned for).
"""

import contextlib
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


class _Damaged(InputError):
  """A checkpoint that cannot be read, however often it is tried."""


# TensorStore's errors are ValueErrors that begin with a status; these may pass by themselves.
_STORAGE_STATUS = (
  "ABORTED",
  "CANCELLED",
  "DEADLINE_EXCEEDED",
  "RESOURCE_EXHAUSTED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "UNKNOWN",
)


@contextlib.contextmanager
def _reading(place: str, mend: str = ""):
  """Turns what reading the checkpoint at `place` raises into an InputError that names it.

  It is `_Damaged`, with `mend`, only if neither rights, nor memory, nor the storage is the cause.
  """
  try:
    with os.scandir(place) as items:  # Orbax takes what it may not list for missing
      for item in items:
        if item.is_dir():
          os.listdir(item)
    yield
  except Exception as error:  # Orbax, TensorStore, epath, json and JAX all have their own
    cause = error
    while cause.__cause__:  # Orbax wraps TensorStore's errors
      cause = cause.__cause__
    reason = " ".join(str(cause).split())[:300]
    device = isinstance(cause, jax.errors.JaxRuntimeError)
    missing = isinstance(cause, FileNotFoundError | NotADirectoryError)
    if isinstance(cause, MemoryError) or (device and "RESOURCE_EXHAUSTED" in reason):
      raise InputError(
        f"{place} does not fit into memory: {reason}; use more devices, and split what each of "
        "them holds with mesh.zero_stage and mesh.fsdp"
      ) from error
    if device:
      raise
    if isinstance(cause, PermissionError) or reason.startswith("PERMISSION_DENIED"):
      raise InputError(f"{place} may not be read: {reason}; give this user the right") from error
    if (isinstance(cause, OSError) and not missing) or reason.startswith(_STORAGE_STATUS):
      raise InputError(
        f"{place} cannot be read now: {reason}; repeat the command when the storage is well, or "
        "move this checkpoint away to use the one before"
      ) from error
    raise _Damaged(f"{place} cannot be read: {reason}{mend}") from error


def restore_newest(
  manager: ocp.CheckpointManager, state: TrainState
) -> tuple[TrainState, dict] | None:
  """The newest state that is not damaged, and its progress; None if nothing was ever saved.

  Args:
    manager: from `open_checkpoints`.
    state: TrainState of jax.ShapeDtypeStruct with shardings: what is wanted, and where.

  Raises:
    InputError: all checkpoints are damaged; or the newest that is not cannot be read for want of
      rights or memory, or because the storage fails.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for step in steps:
    try:
      with _reading(os.path.join(manager.directory, str(step))):
        found = manager.restore(
          step,
          args=ocp.args.Composite(
            params=ocp.args.StandardRestore(state.params),
            optimizer=ocp.args.StandardRestore(_without_params(state)),
            progress=ocp.args.JsonRestore(),
          ),
        )
    except _Damaged as error:
      logging.error("checkpoint %s", error)
      continue
    return TrainState(**{**found.optimizer, "params": found.params}), found.progress
  if steps:
    raise InputError(
      f"{manager.directory}: none of the checkpoints {steps} can be read; the log above says why. "
      "Restore one of them, or start in a new --workdir"
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
    InputError: the checkpoint cannot be read, or has one of another shape.
  """
  checkpoint = os.path.join(os.path.abspath(workdir), "checkpoints", str(step))
  place = epath.Path(checkpoint) / "params"
  handler = ocp.PyTreeCheckpointHandler()
  mend = "; restore it, or move it away to use the checkpoint before"
  with _reading(checkpoint, mend):
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
  with _reading(checkpoint, mend):
    return trees.flatten(handler.restore(place, args=args))
