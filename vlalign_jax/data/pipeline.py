"""The input pipeline: batches of a plan, tokenized and decoded by grain ahead of their step."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import grain
import numpy as np
from absl import logging

from vlalign_jax.data.encode import Example
from vlalign_jax.data.plan import BatchPlan
from vlalign_jax.data.rows import answer_places, build_row
from vlalign_jax.data.workers import call, lost_worker, start_pool
from vlalign_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Planned data, whose batches can be made from any step on; can be pickled.

  Attributes:
    plan: which examples share which row at which step.
    load_example: example number -> Example. It should hold the records in a `workers.SharedList`,
      else each worker process gets a copy of them all.
    load_image: (path, its size by the plan or None) -> uint8[n, H, W, 3], its n tiles.
    image_token_id: the id that marks image positions.
    tokens_per_image: P, image tokens of one tile; an image of a LLaVA is one.
    image_size: (H, W) of a tile in pixels.
    pad_id: the token id of padding.
    records: the number of distinct records in the plan.
    max_answers: K, the most ranked answers of an example; 0 if examples have none.
    on_bad_record: "error": an InputError of `load_example` or `load_image` reaches the caller at
      its step; "skip": the example is left out, its tokens become padding, a warning names it.
    workers: processes that make rows (see `workers.start_pool`); 0 for threads of this process.
  """

  plan: BatchPlan
  load_example: Callable[[int], Example]
  load_image: Callable[[str, tuple[int, int] | None], np.ndarray]
  image_token_id: int
  tokens_per_image: int
  image_size: tuple[int, int]
  pad_id: int = 0
  records: int = 0
  max_answers: int = 0
  on_bad_record: str = "error"
  workers: int = 0

  def batches(
    self,
    *,
    blocks: Sequence[int] = (0,),
    block_count: int = 1,
    start_step: int = 0,
    threads: int = 8,
    prefetch: int = 2,
    **changes,
  ) -> Batches:
    """Returns an iterator over this host's batches, made ahead of time; close it, or use `with`.

    The rows of a step are cut into block_count equal blocks of consecutive rows. A batch has those
    of `blocks`, in this order, B rows together: the arrays of `rows.empty_row` with a leading B;
    images uint8[B, I, H, W, 3], zeros where a row has fewer; skipped int32[B], examples left out of
    each row; with max_answers also those of `rows.answer_places`. B, T and I may change from step
    to step (`plan.row_counts`, `plan.lengths`, `plan.image_counts`).

    Args:
      blocks, block_count: this host's share of the rows.
      start_step: the step of the first batch, counted from 0.
      threads: threads of this process that make rows if there are no worker processes.
      prefetch: number of steps to make ahead.
      **changes: attributes to use in place of this object's, such as `workers`.

    Raises:
      ValueError: a step's rows are not a multiple of block_count, or an argument is out of range.
    """
    prepared = dataclasses.replace(self, **changes)
    known = blocks and set(blocks) <= set(range(block_count))
    if not known or np.any(self.plan.row_counts % block_count):
      counts = np.unique(self.plan.row_counts).tolist()
      raise ValueError(f"no share {tuple(blocks)} of {block_count} of {counts} rows")
    if prepared.on_bad_record not in ("error", "skip"):
      raise ValueError(f'on_bad_record "{prepared.on_bad_record}" is neither "error" nor "skip"')
    load_row = _LoadRow(prepared, tuple(blocks), block_count)
    return Batches(load_row, start_step, threads, max(prefetch, 1))

  def read(self, **options) -> list[dict[str, np.ndarray]]:
    """Makes every batch once, so that a bad record raises its InputError.

    Returns:
      `segments` and `skipped` of each batch, see `batches`, which also takes the options.
    """
    with self.batches(**options) as batches:
      return [{name: batch[name] for name in ("segments", "skipped")} for batch in batches]

  @property
  def identity(self) -> dict[str, int]:
    """Returns numbers that a resumed run compares to know that its plan is the same; for JSON."""
    return {
      "steps": self.plan.steps,
      "records": self.records,
      "examples": int(self.plan.fingerprints[-1]),
    }

  @property
  def max_segments(self) -> int:
    """Returns S, the most examples in a row."""
    return self.plan.max_segments


class Batches:
  """Iterator over batches whose state is the next step only.

  So a run can resume with another number of hosts, workers or threads.
  """

  def __init__(self, load_row: _LoadRow, start_step: int, threads: int, prefetch: int):
    self._load_row, self._data, self._plan = load_row, load_row.data, load_row.data.plan
    self._threads, self._prefetch = threads, prefetch
    self._iterator = None  # grain's, from the first batch on
    self._pool = None
    self._closed = False
    self._seek(start_step)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._closed:
      raise ValueError("these batches are closed")
    if self._step == self._plan.steps:
      raise StopIteration
    if self._iterator is None:
      self._iterator = self._start()
    try:
      batch, problems = next(self._iterator)
    except BrokenProcessPool:
      self.close()
      raise lost_worker() from None
    for problem in problems:
      if self._data.on_bad_record == "error":
        self.close()
        raise InputError(problem)
      logging.warning("Left out of step %d: %s", self._step + 1, problem)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns {"step": number of batches so far, "examples": their checksum}, for JSON."""
    return {"step": self._step, "examples": int(self._plan.fingerprints[self._step])}

  def set_state(self, state: dict[str, int]) -> None:
    """Continues after the steps of `state`.

    Raises:
      InputError: those steps had other examples than the plan's.
    """
    step, fingerprints = state["step"], self._plan.fingerprints
    if step >= len(fingerprints) or state["examples"] != fingerprints[step]:
      raise InputError(
        f"the checkpoint's first {step} steps had other examples than the data files and settings "
        "give now; restore data.*, batch_size and seed, or start in a new --workdir"
      )
    self._seek(step)

  def close(self) -> None:
    """Ends threads and worker processes; may be called again."""
    self._closed = True
    self._stop()
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _seek(self, step: int) -> None:
    if not 0 <= step <= self._plan.steps:
      raise ValueError(f"step {step} of a plan of {self._plan.steps}")
    self._stop()
    self._step = step

  def _stop(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _start(self) -> grain.DatasetIterator:
    load, num_rows, threads = self._load_row, self._load_row.num_rows, self._threads
    ahead, workers = self._prefetch * num_rows, self._data.workers
    if workers:
      # grain's threads then only wait for processes. Its own mp_prefetch leaves processes behind
      # when this one is killed, and takes 25 s to close if a worker's last rows fill a pipe.
      self._pool = self._pool or start_pool(load, workers)
      load, threads = functools.partial(_load_in_worker, self._pool), 2 * workers
    elements = grain.MapDataset.range(self._step * num_rows, self._plan.steps * num_rows)
    rows = elements.map(load).to_iter_dataset(grain.ReadOptions(min(threads, ahead), ahead))
    return iter(rows.batch(num_rows, batch_fn=self._load_row.stack))


def _load_in_worker(pool: ProcessPoolExecutor, element: int) -> _Row:
  return pool.submit(call, element).result()


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
  """One row, as a thread or a worker process returns it."""

  arrays: dict[str, np.ndarray]  # of `rows.build_row`
  images: np.ndarray  # uint8[n, H, W, 3], the tiles of its distinct images
  places: int  # I of its step
  problems: tuple[str, ...]  # errors of the examples left out


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadRow:
  """Makes the rows of a host: element s * num_rows + b is row b of its share of step s.

  A step with fewer rows than the fullest has rows without arrays in place of the last ones (grain
  would leave out None, and batches would shift).
  """

  data: Prepared
  blocks: tuple[int, ...]
  block_count: int

  @property
  def num_rows(self) -> int:
    """Returns the most rows of this host in a step."""
    return self.data.plan.rows // self.block_count * len(self.blocks)

  def __call__(self, element: int) -> _Row:
    plan = self.data.plan
    step, row = divmod(int(element), self.num_rows)
    per_block = int(plan.row_counts[step]) // self.block_count
    if row >= per_block * len(self.blocks):
      return _Row({}, np.zeros(0), 0, ())
    block, row = divmod(row, per_block)
    numbers = plan.rows_of(step, self.blocks[block] * per_block + row)
    try:
      return self._load(numbers, int(plan.lengths[step]), int(plan.image_counts[step]))
    except Exception as error:
      # An exception that cannot be unpickled would break the pool without being shown.
      failure = RuntimeError(f"examples {numbers.tolist()}: {type(error).__name__}: {error}")
      failure.add_note(traceback.format_exc())
      raise failure from None

  def _load(self, numbers: np.ndarray, length: int, places: int) -> _Row:
    data, examples, loaded, problems, pixels = self.data, [], [], [], {}
    for number in numbers:
      try:
        example = data.load_example(int(number))
      except InputError as error:  # its message names the record
        problems.append(str(error))
        continue
      try:
        sizes = [picture.size for picture in example.pictures] or [None] * len(example.images)
        for path, size in zip(example.images, sizes, strict=True):
          if path not in pixels:
            pixels[path] = data.load_image(path, size)
      except InputError as error:
        problems.append(f"{example.where}: {error}")
        continue
      examples.append(example)
      loaded.append(int(number))
    sizes = places, data.image_token_id, data.tokens_per_image
    arrays, paths = build_row(examples, length, *sizes, data.pad_id)
    if data.max_answers:
      arrays |= answer_places(examples, loaded, data.max_segments, data.max_answers)
    images = [np.zeros((0, *data.image_size, 3), np.uint8), *(pixels[path] for path in paths)]
    return _Row(arrays, np.concatenate(images), places, tuple(problems))

  def stack(self, rows: Sequence[_Row]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns (the batch of these rows, the problems of all of them)."""
    rows = [row for row in rows if row.arrays]
    batch = {name: np.stack([row.arrays[name] for row in rows]) for name in rows[0].arrays}
    shape = len(rows), rows[0].places, *self.data.image_size, 3
    batch["images"] = np.zeros(shape, np.uint8)
    for place, row in zip(batch["images"], rows, strict=True):
      place[: len(row.images)] = row.images
    batch["skipped"] = np.array([len(row.problems) for row in rows], np.int32)
    return batch, [problem for row in rows for problem in row.problems]
