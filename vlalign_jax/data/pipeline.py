"""The input pipeline: a plan's batches, tokenised and decoded ahead of the step by grain."""

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


def batches(
  plan: BatchPlan,
  load_example: Callable[[int], Example],
  load_image: Callable[[str], np.ndarray],
  *,
  image_token_id: int,
  tokens_per_image: int,
  image_size: tuple[int, int],
  pad_id: int = 0,
  max_segments: int = 0,
  max_answers: int = 0,
  blocks: Sequence[int] = (0,),
  block_count: int = 1,
  start_step: int = 0,
  on_bad_record: str = "error",
  workers: int = 0,
  threads: int = 8,
  prefetch: int = 2,
) -> Batches:
  """One batch of this host's rows a step, made ahead of time; use it in a `with`, or close it.

  The rows of a step are cut into block_count equal blocks of consecutive rows. A batch holds those
  of `blocks`, in this order, B rows together: the arrays of `rows.empty_row` with a leading B;
  images uint8[B, I, H, W, 3], zeros where a row has fewer; skipped int32[B], examples left out of
  each row; with max_answers those of `rows.answer_places`, too. I is `plan.images`; B and T may
  change from step to step (`plan.row_counts`, `plan.lengths`).

  Args:
    plan: what to learn at which step.
    load_example: example number -> Example; can be pickled. Hold the records in a
      `workers.SharedList`, else each worker process gets a copy of them all.
    load_image: path -> uint8[H, W, 3]; can be pickled.
    image_token_id: the id that marks image positions.
    tokens_per_image: P, image tokens of one image.
    image_size: (H, W) in pixels.
    pad_id: the token id of padding.
    max_segments, max_answers: the most examples of a row and the most ranked answers of an example,
      where examples have ranked answers; else 0.
    blocks, block_count: which share of the rows is this host's.
    start_step: the first step to give, counted from 0.
    on_bad_record: "error": an InputError of `load_example` or `load_image` reaches the caller at
      its step; "skip": the example is left out, its tokens become padding, a warning names it.
    workers: processes that make rows (see `workers.start_pool`); 0 for threads of this process.
    threads: threads of this process that make rows if `workers` is 0.
    prefetch: steps to be ahead.

  Raises:
    ValueError: a step's rows are no multiple of block_count, or an argument is out of range.
  """
  known = blocks and set(blocks) <= set(range(block_count))
  if not known or np.any(plan.row_counts % block_count):
    counts = np.unique(plan.row_counts).tolist()
    raise ValueError(f"no share {tuple(blocks)} of {block_count} of {counts} rows")
  if on_bad_record not in ("error", "skip"):
    raise ValueError(f'on_bad_record "{on_bad_record}" is neither "error" nor "skip"')
  load_row = _LoadRow(
    plan=plan,
    load_example=load_example,
    load_image=load_image,
    image_token_id=image_token_id,
    tokens_per_image=tokens_per_image,
    image_size=image_size,
    pad_id=pad_id,
    max_segments=max_segments,
    max_answers=max_answers,
    skip=on_bad_record == "skip",
    blocks=tuple(blocks),
    block_count=block_count,
  )
  return Batches(load_row, start_step, workers, threads, max(prefetch, 1))


class Batches:
  """Iterator over batches; its state is the next step, whatever makes the rows.

  A run may therefore go on with another number of hosts, workers or threads.
  """

  def __init__(
    self, load_row: _LoadRow, start_step: int, workers: int, threads: int, prefetch: int
  ):
    self._load_row = load_row
    self._workers, self._threads, self._prefetch = workers, threads, prefetch
    self._made = None  # grain's iterator, from the first batch on
    self._pool = None
    self._closed = False
    self._seek(start_step)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._closed:
      raise ValueError("these batches are closed")
    if self._step == self._load_row.plan.steps:
      raise StopIteration
    if self._made is None:
      self._made = self._start()
    try:
      batch, problems = next(self._made)
    except BrokenProcessPool:
      self.close()
      raise lost_worker() from None
    for problem in problems:
      if not self._load_row.skip:
        self.close()
        raise InputError(problem)
      logging.warning("Left out of step %d: %s", self._step + 1, problem)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """{"step": steps given so far, "examples": checksum of theirs}; goes through JSON."""
    return {
      "step": self._step,
      "examples": int(self._load_row.plan.fingerprints[self._step]),
    }

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on after the steps of `state`.

    Raises:
      InputError: those steps had other examples than the plan's.
    """
    step, fingerprints = state["step"], self._load_row.plan.fingerprints
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
    if not 0 <= step <= self._load_row.plan.steps:
      raise ValueError(f"step {step} of a plan of {self._load_row.plan.steps}")
    self._stop()
    self._step = step

  def _stop(self) -> None:
    if self._made is not None:
      self._made.close()
      self._made = None

  def _start(self) -> grain.DatasetIterator:
    rows, load, threads = self._load_row.rows, self._load_row, self._threads
    ahead = self._prefetch * rows
    if self._workers:
      # grain's threads then only wait for processes. Its own mp_prefetch leaves processes behind
      # when this one is killed, and takes 25 s to close where a worker's last rows fill a pipe.
      self._pool = self._pool or start_pool(self._load_row, self._workers)
      load, threads = functools.partial(_load_in_worker, self._pool), 2 * self._workers
    elements = grain.MapDataset.range(self._step * rows, self._load_row.plan.steps * rows)
    made = elements.map(load).to_iter_dataset(grain.ReadOptions(min(threads, ahead), ahead))
    return iter(made.batch(rows, batch_fn=self._load_row.stack))


def _load_in_worker(pool: ProcessPoolExecutor, element: int) -> _Row:
  return pool.submit(call, element).result()


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
  """One row, on its way from the thread or process that made it."""

  arrays: dict[str, np.ndarray]  # as of `rows.build_row`
  images: np.ndarray  # uint8[n, H, W, 3], its n distinct images
  problems: tuple[str, ...]  # of the examples that were left out


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadRow:
  """Makes the elements of a host: element s * rows + b is row b of its share of step s.

  A step with fewer rows than the fullest has rows without arrays in place of the last ones (grain
  would leave out None, and batches would shift).
  """

  plan: BatchPlan
  load_example: Callable[[int], Example]
  load_image: Callable[[str], np.ndarray]
  image_token_id: int
  tokens_per_image: int
  image_size: tuple[int, int]
  pad_id: int
  max_segments: int
  max_answers: int
  skip: bool
  blocks: tuple[int, ...]
  block_count: int

  @property
  def rows(self) -> int:
    """The most rows of this host in a step."""
    return self.plan.rows // self.block_count * len(self.blocks)

  def __call__(self, element: int) -> _Row:
    step, row = divmod(int(element), self.rows)
    per_block = int(self.plan.row_counts[step]) // self.block_count
    if row >= per_block * len(self.blocks):
      return _Row({}, np.zeros(0), ())
    block, row = divmod(row, per_block)
    numbers = self.plan.rows_of(step, self.blocks[block] * per_block + row)
    try:
      return self._load(numbers, int(self.plan.lengths[step]))
    except Exception as error:
      # An exception that cannot be unpickled would break the pool and not be shown.
      failure = RuntimeError(f"examples {numbers.tolist()}: {type(error).__name__}: {error}")
      failure.add_note(traceback.format_exc())
      raise failure from None

  def _load(self, numbers: np.ndarray, length: int) -> _Row:
    examples, held, problems, pixels = [], [], [], {}
    for number in numbers:
      try:
        example = self.load_example(int(number))
      except InputError as error:  # these name the record themselves
        problems.append(str(error))
        continue
      try:
        for path in example.images:
          if path not in pixels:
            pixels[path] = self.load_image(path)
      except InputError as error:
        problems.append(f"{example.where}: {error}")
        continue
      examples.append(example)
      held.append(int(number))
    arrays, paths = build_row(
      examples, length, self.plan.images, self.image_token_id, self.tokens_per_image, self.pad_id
    )
    if self.max_answers:
      arrays |= answer_places(examples, held, self.max_segments, self.max_answers)
    images = np.zeros((len(paths), *self.image_size, 3), np.uint8)
    for slot, path in enumerate(paths):
      images[slot] = pixels[path]
    return _Row(arrays, images, tuple(problems))

  def stack(self, rows: list[_Row]) -> tuple[dict[str, np.ndarray], list[str]]:
    """(the batch of these rows, the problems of all of them)."""
    rows = [row for row in rows if row.arrays]
    batch = {name: np.stack([row.arrays[name] for row in rows]) for name in rows[0].arrays}
    batch["images"] = np.zeros((len(rows), self.plan.images, *self.image_size, 3), np.uint8)
    for place, row in zip(batch["images"], rows, strict=True):
      place[: len(row.images)] = row.images
    batch["skipped"] = np.array([len(row.problems) for row in rows], np.int32)
    return batch, [problem for row in rows for problem in row.problems]
