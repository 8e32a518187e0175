"""Starts worker processes, and shares sequences with them without a copy for each."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import numpy as np

from vlalign_jax.errors import InputError


def start_pool(function: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
  """Starts processes that compute function(x) for `pool.submit(call, x)`.

  They are spawned, as a fork of a process that runs JAX's threads may hang. So the main module must
  be importable, and `function`, its arguments and its results picklable.
  """
  pool = ProcessPoolExecutor(workers, _Spawn(), _start_worker, (function,))
  # This process handles Ctrl-C and a SIGTERM to the process group or job. Children inherit the
  # blocked signals when they are spawned, on the first calls.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    for _ in range(workers):
      pool.submit(os.getpid)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  return pool


class _Worker(SpawnProcess):
  def terminate(self) -> None:
    """Kills the worker when another one has died; SIGTERM would not end it."""
    self.kill()


class _Spawn(SpawnContext):
  Process = _Worker


def lost_worker() -> InputError:
  """Returns the error to show the user for a BrokenProcessPool."""
  return InputError(
    "a worker process ended abruptly; if it shows no error above, it was killed for lack of "
    "memory: use fewer workers"
  )


def call(argument: Any) -> Any:
  """Runs the pool's function in a worker."""
  return _function(argument)


def _start_worker(function: Callable[[Any], Any]) -> None:
  """Sets the worker's function, and ends the worker when its parent ends, even by SIGKILL."""
  global _function
  _function = function
  sentinel = multiprocessing.parent_process().sentinel
  threading.Thread(target=_exit_with, args=(sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
  connection.wait([sentinel])
  os._exit(1)


class SharedList(Sequence):
  """A sequence that worker processes read from one memory-mapped file.

  Pickling a million records for each worker would take minutes and a copy in memory each. This is
  pickled as the path of a file, written when first needed; a worker unpickles from it the items
  that it uses. The file is deleted with this object or its process.
  """

  def __init__(self, items: Sequence[Any]):
    """Keeps `items`, which must not change and can be pickled."""
    self._items = items
    self._file = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, index):
    return self._items[index]

  def __iter__(self) -> Iterator[Any]:
    return iter(self._items)

  def __reduce__(self):
    with self._lock:
      if self._file is None:
        self._file, self._path = _write(self._items)
    return StoredList, (self._path,)


class StoredList(Sequence):
  """A SharedList in a worker process."""

  def __init__(self, path: str):
    self._path = path
    with open(path, "rb") as file:
      self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length = int(np.frombuffer(self._bytes[-8:], np.int64)[0])
    self._offsets = np.frombuffer(self._bytes[-8 * (length + 2) : -8], np.int64)

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index: int):
    place = range(len(self))[index]  # also of negative ones; IndexError past the end
    return pickle.loads(self._bytes[self._offsets[place] : self._offsets[place + 1]])

  def __reduce__(self):
    return StoredList, (self._path,)


def _write(items: Sequence[Any]):
  """Writes the pickled items, int64 offsets, and the int64 number of items."""
  file = tempfile.TemporaryFile(prefix="vlalign_jax_")  # noqa: SIM115 (kept by the SharedList)
  path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
  if not os.path.exists(path):  # not Linux: a named file, which remains after a SIGKILL
    file = tempfile.NamedTemporaryFile(prefix="vlalign_jax_")  # noqa: SIM115
    path = file.name
  offsets = np.zeros(len(items) + 1, np.int64)
  for i, item in enumerate(items):
    offsets[i + 1] = offsets[i] + file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
  file.write(b"\0" * (-int(offsets[-1]) % 8))  # numpy needs aligned offsets
  file.write(offsets.tobytes() + np.int64(len(items)).tobytes())
  file.flush()
  return file, path
