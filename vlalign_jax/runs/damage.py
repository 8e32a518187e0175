"""What it means that a checkpoint cannot be read: it is damaged, or something else is wrong."""

import contextlib
import os

import jax

from vlalign_jax import storage
from vlalign_jax.errors import InputError


class Damaged(InputError):
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
def reading(place: str, mend: str = ""):
  """Turns what reading the checkpoint at `place` raises into an InputError that names it.

  It is `Damaged`, with `mend`, only if neither rights, nor memory, nor the storage is the cause.
  """
  try:
    if not storage.is_url(place):
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
    raise Damaged(f"{place} cannot be read: {reason}{mend}") from error
