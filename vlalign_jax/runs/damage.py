"""Tells damaged checkpoints from those that cannot be read for another reason."""

import contextlib
import os

import jax

from vlalign_jax import storage
from vlalign_jax.errors import InputError, shorten


class Damaged(InputError):
  """A checkpoint is damaged: trying again does not help."""


# TensorStore's errors are ValueErrors that begin with a status; after these, trying again may help.
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
def reading(checkpoint: str, fix: str = ""):
  """Turns any error of reading a checkpoint into an InputError that names its path.

  Permissions, memory and the storage have errors that say so; all else raises `Damaged`, whose
  message ends with `fix`.
  """
  try:
    if not storage.is_url(checkpoint):
      with os.scandir(checkpoint) as items:  # Orbax calls what may not be listed missing
        for item in items:
          if item.is_dir():
            os.listdir(item)
    yield
  except Exception as error:  # Orbax, TensorStore, epath, json and JAX have errors of many types
    cause = error
    while cause.__cause__:  # Orbax wraps TensorStore's errors
      cause = cause.__cause__
    reason = shorten(str(cause), 150)
    from_jax = isinstance(cause, jax.errors.JaxRuntimeError)
    missing = isinstance(cause, FileNotFoundError | NotADirectoryError)
    if isinstance(cause, MemoryError) or (from_jax and "RESOURCE_EXHAUSTED" in reason):
      raise InputError(
        f"{checkpoint} does not fit into memory: {reason}; use more devices, and shard over them "
        "with mesh.zero_stage and mesh.fsdp"
      ) from error
    if from_jax:
      raise
    if isinstance(cause, PermissionError) or reason.startswith("PERMISSION_DENIED"):
      raise InputError(f"{checkpoint} may not be read: {reason}; permit this user to") from error
    if (isinstance(cause, OSError) and not missing) or reason.startswith(_STORAGE_STATUS):
      raise InputError(
        f"{checkpoint} cannot be read now: {reason}; try again when the storage works, or move "
        "this checkpoint away to use the one before"
      ) from error
    raise Damaged(f"{checkpoint} cannot be read: {reason}{fix}") from error
