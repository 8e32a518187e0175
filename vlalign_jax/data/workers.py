"""Worker processes, and sequences that reach them without being copied."""

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
  """Worker processes that hold `function`, for `pool.submit(call, x)` to give function(x).

  They are spawned: a fork of a process that runs JAX's threads may hang. The main module must
  therefore be importable, and `function`, what it is given and what it returns picklable.
  """
  pool = ProcessPoolExecutor(workers, _Spawn(), _start_worker, (function,))
  # Ctrl-C and a SIGTERM to the whole process group or job are this process's to handle. Children
  # inherit what is blocked while they are spawned, which happens on the first calls.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    for _ in range(workers):
      pool.submit(os.getpid)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  return pool


class _Worker(SpawnProcess):
  def terminate(self) -> None:
    """Called where another worker has died: SIGTERM would not end this one."""
    self.kill()


class _Spawn(SpawnContext):
  Process = _Worker


def lost_worker() -> InputError:
  """What a BrokenProcessPool of such a pool means to the user."""
  return InputError(
    "a worker process ended abruptly; if no error of its own is shown above, it was killed for "
    "want of memory: use fewer workers"
  )


def call(argument: Any) -> Any:
  """Runs the pool's function, in a worker."""
  return _function(argument)


def _start_worker(function: Callable[[Any], Any]) -> None:
  """Only a parent that exits in order ends its workers; after a SIGKILL they would wait forever."""
  global _function
  _function = function
  sentinel = multiprocessing.parent_process().sentinel
  threading.Thread(target=_exit_with, args=(sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
  connection.wait([sentinel])
  os._exit(1)


class SharedList(Sequence):
  """A sequence that worker processes read from one memory-mapped file.

  To pickle a million records once per worker takes minutes and as many copies in memory. This is
  pickled as the path of a file, written when the first worker asks for it, from which a worker
  unpickles the items that it needs. The file goes when this object or its process does.
  """

  def __init__(self, items: Sequence[Any]):
    """Keeps `items`, which must not change, and each of which can be pickled."""
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
  """A SharedList as a worker process sees it."""

  def __init__(self, path: str):
    self._path = path
    with open(path, "rb") as file:
      self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length = int(np.frombuffer(self._bytes[-8:], np.int64)[0])
    self._offsets = np.frombuffer(self._bytes[-8 * (length + 2) : -8], np.int64)

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index: int):
    at = range(len(self))[index]  # negative ones, and an IndexError past the end
    return pickle.loads(self._bytes[self._offsets[at] : self._offsets[at + 1]])

  def __reduce__(self):
    return StoredList, (self._path,)


def _write(items: Sequence[Any]):
  """Writes the items' pickles, int64 offsets, and the int64 number of items."""
  file = tempfile.TemporaryFile(prefix="vlalign_jax_")  # noqa: SIM115 (kept by the SharedList)
  path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
  if not os.path.exists(path):  # not Linux: a named file, which a SIGKILL leaves behind
    file = tempfile.NamedTemporaryFile(prefix="vlalign_jax_")  # noqa: SIM115
    path = file.name
  offsets = np.zeros(len(items) + 1, np.int64)
  for i, item in enumerate(items):
    offsets[i + 1] = offsets[i] + file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
  file.write(b"\0" * (-int(offsets[-1]) % 8))  # numpy wants the offsets aligned
  file.write(offsets.tobytes() + np.int64(len(items)).tobytes())
  file.flush()
  return file, path
