"""Measures the lengths and images of all records before the run; the plan is made from these."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from absl import logging

from vlalign_jax.data.plan import ImageSets
from vlalign_jax.data.workers import call, lost_worker, start_pool
from vlalign_jax.errors import InputError

# Below this many records, worker processes take longer to start than they save.
POOL_FROM = 20_000
# Each worker process takes seconds to start, and holds its own copy of the tokenizer.
MAX_WORKERS = 32
_CHUNK = 500

# Record number -> (tokens, C counts, image paths, as a mapping if images may have several tiles).
LoadEncoded = Callable[[int], tuple[int, Sequence[int], Sequence[str] | Mapping[str, int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """The sizes of N tokenized records.

  Attributes:
    lengths: int32[N], tokens.
    counts: int32[N, C], other counts of each record, such as turns dropped.
    images: distinct images of each record.
    problems: errors of the records that are left out; these have length 0.
  """

  lengths: np.ndarray
  counts: np.ndarray
  images: ImageSets
  problems: tuple[str, ...] = ()


def measure(
  load_encoded: LoadEncoded,
  n: int,
  workers: int = 0,
  pool_from: int = POOL_FROM,
  skips: bool = False,
) -> Measured:
  """Calls `load_encoded` for the records 0 to n - 1, in worker processes if there are many.

  Args:
    load_encoded: record number -> (tokens, C counts, image paths); can be pickled. Hold the records
      in a `workers.SharedList`, else each process gets a copy of them all.
    n: N, the number of records.
    workers: the most processes to use; with fewer than 2, this process measures. There are never
      more than MAX_WORKERS = 32, nor more than there is work for.
    pool_from: the number of records from which worker processes are started.
    skips: whether a record for which `load_encoded` raises an InputError is left out.

  Raises:
    InputError: without `skips`, the first one that `load_encoded` raises, in whichever process.
  """
  records = map_records(_Skip(load_encoded) if skips else load_encoded, n, workers, pool_from)
  problems = tuple(record for record in records if isinstance(record, str))
  width = next((len(record[1]) for record in records if not isinstance(record, str)), 1)
  records = [(0, (0,) * width, ()) if isinstance(record, str) else record for record in records]
  return Measured(
    lengths=np.array([length for length, _, _ in records], np.int32),
    counts=np.array([counts for _, counts, _ in records], np.int32),
    images=ImageSets.from_paths(images for _, _, images in records),
    problems=problems,
  )


@dataclasses.dataclass(frozen=True)
class _Skip:
  """Returns the text of an InputError in place of raising it; can be pickled."""

  load_encoded: LoadEncoded

  def __call__(self, number: int):
    try:
      return self.load_encoded(number)
    except InputError as error:
      return str(error)


def map_records(
  function: Callable[[int], Any], n: int, workers: int = 0, pool_from: int = POOL_FROM
) -> list[Any]:
  """Returns [function(0), ..., function(n - 1)]; arguments and errors as in `measure`."""
  chunks = [range(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
  workers = min(workers, MAX_WORKERS, len(chunks))
  if workers < 2 or n < pool_from:
    return [result for chunk in chunks for result in _map_chunk(function, chunk)]
  pool = start_pool(functools.partial(_map_chunk, function), workers)
  try:
    results = []
    for part in pool.map(call, chunks):
      results += part
      logging.log_every_n_seconds(logging.INFO, "measured %d of %d records", 10, len(results), n)
  except InputError as error:
    raise InputError(str(error)) from None  # without the worker's traceback
  except BrokenProcessPool:
    raise lost_worker() from None
  finally:
    pool.shutdown(cancel_futures=True)
  return results


def _map_chunk(function: Callable[[int], Any], chunk: range) -> list[Any]:
  return [function(index) for index in chunk]
