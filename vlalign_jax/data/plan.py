"""The plan: which examples share which row at which step, decided before the first step.

Every host computes the same plan from the same numbers, so hosts agree without communication and
a resumed run continues where it stopped. Packing never changes which examples a step learns from.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Row lengths are multiples of this, which suits the tiles of attention kernels.
LENGTH_MULTIPLE = 64
# The steps of a packed run have at most this many different numbers of rows, each of which is
# compiled. With one for all, that of the fullest step, a fifth of the work would be padding.
ROW_COUNTS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSets:
  """The distinct images of N examples, as numbers: example e shows ids[offsets[e]:offsets[e+1]].

  Attributes:
    offsets: int64[N+1].
    ids: int32[K], an image has the same number in every example that shows it.
    tiles: int32[M], the tiles of each image, which are its places in a row; None: one each.
  """

  offsets: np.ndarray
  ids: np.ndarray
  tiles: np.ndarray | None = None

  @classmethod
  def from_paths(cls, paths: Iterable[Sequence[str] | Mapping[str, int]]) -> ImageSets:
    """Numbers the images of each example; a path twice in one example counts once.

    Args:
      paths: of each example's images; a mapping gives the tiles of each image, else it has one.
    """
    number: dict[str, int] = {}
    offsets, ids, tiles = [0], [], {}
    for example in paths:
      ids.extend(number.setdefault(path, len(number)) for path in dict.fromkeys(example))
      offsets.append(len(ids))
      if isinstance(example, Mapping):
        tiles |= example
    places = [tiles.get(path, 1) for path in number]
    return cls(np.array(offsets, np.int64), np.array(ids, np.int32), np.array(places, np.int32))

  @property
  def counts(self) -> np.ndarray:
    """Returns int64[N], the number of distinct images of each example."""
    return np.diff(self.offsets)

  @property
  def places(self) -> np.ndarray:
    """Returns int64[N], the number of tiles of the distinct images of each example."""
    total = np.append(0, np.cumsum(self.tiles_of(self.ids)))
    return total[self.offsets[1:]] - total[self.offsets[:-1]]

  def tiles_of(self, ids: np.ndarray | int) -> np.ndarray:
    """Returns int64[...], the tiles of images."""
    ids = np.asarray(ids, np.int64)
    return np.ones_like(ids) if self.tiles is None else self.tiles[ids].astype(np.int64)

  def gather(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists the images of `examples`: (int64[K'] index into `examples`, int32[K'] image)."""
    counts = self.counts[examples]
    index = np.repeat(np.arange(len(examples)), counts)
    within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return index, self.ids[self.offsets[examples][index] + within]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
  """Steps of up to R rows; a row of step s holds up to lengths[s] tokens and image_counts[s] tiles.

  Attributes:
    batch_size: examples of a step (the last step may have fewer).
    rows: R, the most rows of a step, over all hosts.
    row_counts: int32[S], rows of each step; few distinct numbers.
    image_counts: int32[S], I of each step: places for the tiles of a row's distinct images (an
      image of one tile has one). Steps with equal rows and lengths have the same, so that sizes of
      images add no shape to compile; 0 where no such step has an image.
    lengths: int32[S], T of each step.
    examples: int64[M], example numbers, row by row.
    example_lengths: int32[M], tokens of each.
    offsets: int64[S*R+1], row r of step s holds examples[offsets[s*R+r]:offsets[s*R+r+1]].
    tokens: int64[S], tokens of each step that are not padding.
    row_images: int32[S*R], tiles of the distinct images of each row.
    fingerprints: uint32[S+1], a checksum of the examples before each step; packing does not
      change it.
  """

  batch_size: int
  rows: int
  row_counts: np.ndarray
  image_counts: np.ndarray
  lengths: np.ndarray
  examples: np.ndarray
  example_lengths: np.ndarray
  offsets: np.ndarray
  tokens: np.ndarray
  row_images: np.ndarray
  fingerprints: np.ndarray

  @property
  def steps(self) -> int:
    return len(self.lengths)

  @property
  def images(self) -> int:
    """Returns the most image places of a row."""
    return int(self.image_counts.max())

  @functools.cached_property
  def max_segments(self) -> int:
    """Returns the most examples in a row."""
    return int(np.diff(self.offsets).max())

  def rows_of(self, step: int, row: int) -> np.ndarray:
    """Returns int64[n], the examples of a row of a step, both from 0; none for a padding row."""
    place = step * self.rows + row
    return self.examples[self.offsets[place] : self.offsets[place + 1]]


def plan_batches(
  order: np.ndarray,
  lengths: np.ndarray,
  images: ImageSets,
  *,
  batch_size: int,
  max_length: int,
  row_multiple: int,
  pack: bool,
  max_images_per_row: int | None = None,
  buckets: Sequence[int] | None = None,
) -> BatchPlan:
  """Plans a run: a step takes the next `batch_size` examples of `order`, the last one the rest.

  With `pack`, first-fit decreasing puts them into rows of one length: of the buckets, the one with
  the fewest tokens in all, reduced to the fullest row. Without, each example has its own row, and a
  step's length is the smallest bucket that holds its longest example.

  Args:
    order: int64[M], example numbers of all epochs, one after the other.
    lengths: int32[N], tokens of each example.
    images: distinct images of each of the N examples.
    batch_size: examples of a step.
    max_length: the most tokens of an example.
    row_multiple: the number of rows of a step is a multiple of this (data shards times gradient
      accumulation); blocks of R / row_multiple consecutive rows get about the same load.
    pack: whether examples share rows.
    max_images_per_row: the most tiles of distinct images of a row; None for no limit.
    buckets: row lengths to choose from; by default `default_buckets(max_length)`.

  Raises:
    ValueError: an example is empty, longer than `max_length` or has too many images, or `order`
      is empty.
  """
  order = np.asarray(order, np.int64)
  lengths = np.asarray(lengths, np.int32)
  if order.size == 0:
    raise ValueError("no examples to plan for")
  longest, counts = int(lengths[order].max()), images.places
  if longest > max_length or int(lengths[order].min()) < 1:
    bad = order[(lengths[order] > max_length) | (lengths[order] < 1)][0]
    raise ValueError(f"example {bad} has {lengths[bad]} tokens; 1 to {max_length} can be planned")
  if max_images_per_row is not None and int(counts[order].max()) > max_images_per_row:
    bad = order[np.argmax(counts[order])]
    raise ValueError(
      f"example {bad} has {counts[bad]} tiles of images; a row takes {max_images_per_row}"
    )
  buckets = sorted(default_buckets(max_length) if buckets is None else buckets)
  if longest > buckets[-1]:
    raise ValueError(f"an example of {longest} tokens does not fit the buckets {buckets}")

  steps = -(-order.size // batch_size)
  stream = np.full((steps, batch_size), -1, np.int64)
  stream.flat[: order.size] = order
  sizes = np.where(stream >= 0, lengths[stream], 0)
  by_length = np.argsort(-sizes, axis=1, kind="stable")  # the last step's empty places come last
  stream = np.take_along_axis(stream, by_length, 1)
  sizes = np.take_along_axis(sizes, by_length, 1)

  if pack:
    row_of, row_counts, row_length = _pack(
      stream, sizes, images, [b for b in buckets if b >= longest], row_multiple, max_images_per_row
    )
    step_lengths = np.full(steps, row_length, np.int32)
  else:
    row_of = np.where(stream >= 0, np.arange(batch_size), -1)
    row_counts = np.full(steps, _round_up(batch_size, row_multiple), np.int32)
    step_lengths = np.array(buckets, np.int32)[np.searchsorted(buckets, sizes[:, 0])]
  rows = int(row_counts.max())

  # Rows come fullest first: dealing them like cards gives every block of rows a similar load.
  place = np.zeros((rows + 1, rows), np.int64)
  for count in np.unique(row_counts):
    dealt = np.arange(count).reshape(-1, row_multiple).T.reshape(-1)
    place[count, :count] = np.argsort(dealt, kind="stable")
  step_of, column = np.nonzero(stream >= 0)
  row = step_of * rows + place[row_counts[step_of], row_of[step_of, column]]
  by_row = np.argsort(row, kind="stable")
  examples = stream[step_of, column][by_row]
  offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=steps * rows))])

  row_images = _distinct_images(row[by_row], examples, images, steps * rows)
  return BatchPlan(
    batch_size=batch_size,
    rows=rows,
    row_counts=row_counts,
    image_counts=_image_counts(row_images.reshape(steps, rows), row_counts, step_lengths),
    lengths=step_lengths,
    examples=examples,
    example_lengths=sizes[step_of, column][by_row],
    offsets=offsets,
    tokens=sizes.sum(1, dtype=np.int64),
    row_images=row_images,
    fingerprints=_fingerprints(order, lengths[order], batch_size),
  )


def default_buckets(max_length: int) -> list[int]:
  """Returns an eighth, a quarter, a half and all of `max_length`, rounded up, without repeats."""
  return sorted({_round_up(-(-max_length // part), LENGTH_MULTIPLE) for part in (8, 4, 2, 1)})


def statistics(plan: BatchPlan) -> dict[str, float]:
  """Measures how well a plan uses its rows, for the log.

  Returns:
    steps, rows (the most of a step), images_per_row; shapes, the number of distinct batch shapes
    (compilations); tokens, without padding; packing_efficiency, tokens over token places;
    image_efficiency, tiles of images over image places; empty_rows, the fraction of rows of
    padding; examples_per_row, over the other rows.
  """
  per_row = np.diff(plan.offsets)
  num_rows, used_rows = int(plan.row_counts.sum()), int(np.sum(per_row > 0))
  image_places = int(np.sum(plan.row_counts * plan.image_counts, dtype=np.int64))
  token_places = int(np.sum(plan.row_counts * plan.lengths, dtype=np.int64))
  return {
    "steps": plan.steps,
    "rows": plan.rows,
    "images_per_row": plan.images,
    "shapes": len(_shapes(plan.row_counts, plan.lengths)[0]),
    "tokens": int(plan.tokens.sum()),
    "packing_efficiency": float(plan.tokens.sum() / token_places),
    "image_efficiency": float(plan.row_images.sum() / image_places) if image_places else 1.0,
    "empty_rows": 1 - used_rows / num_rows,
    "examples_per_row": float(per_row.sum() / used_rows),
  }


def _shapes(row_counts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (the distinct pairs [K, 2] of rows and length, int64[S] the pair of each step)."""
  pairs = np.stack([row_counts, lengths], axis=1)
  distinct, shape_of = np.unique(pairs, axis=0, return_inverse=True)
  return distinct, shape_of.reshape(-1)


def _image_counts(
  row_images: np.ndarray, row_counts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
  """Returns int32[S], the most of row_images [S, R] in all steps with the rows and length of s."""
  distinct, shape_of = _shapes(row_counts, lengths)
  most = np.zeros(len(distinct), np.int32)
  np.maximum.at(most, shape_of, row_images.max(axis=1))
  return most[shape_of]


def _pack(stream, sizes, images, candidates, row_multiple, max_images_per_row):
  """Returns (row of each example, rows of each step, row length) with the cheapest row length."""
  best = None
  for candidate in candidates:
    row_of, fullest = _first_fit(stream, sizes, images, candidate, max_images_per_row)
    length = _round_up(fullest, LENGTH_MULTIPLE)
    needed = row_of.max(axis=1) + 1
    row_counts = _raise_to_few(-(-needed // row_multiple) * row_multiple)
    cost = int(row_counts.sum()) * length
    if best is None or cost < best[0]:
      best = cost, row_of, row_counts.astype(np.int32), length
  return best[1:]


def _raise_to_few(counts: np.ndarray) -> np.ndarray:
  """Raises counts to at most ROW_COUNTS = 3 distinct ones, adding as little as possible."""
  distinct, times = np.unique(counts, return_counts=True)
  if len(distinct) <= ROW_COUNTS:
    return counts
  below, total = np.cumsum(times), counts.size
  # The sum if all are raised to distinct[a], distinct[b] or the highest, for each pair a < b.
  a, b = np.triu_indices(len(distinct) - 1, 1)
  cost = below[a] * distinct[a] + (below[b] - below[a]) * distinct[b]
  cost = cost + (total - below[b]) * distinct[-1]
  cheapest = int(np.argmin(cost))
  allowed = distinct[[a[cheapest], b[cheapest], -1]]
  return allowed[np.searchsorted(allowed, counts)]


def _first_fit(
  stream: np.ndarray,
  sizes: np.ndarray,
  images: ImageSets,
  length: int,
  max_images: int | None,
) -> tuple[np.ndarray, int]:
  """Packs all steps at once by first-fit decreasing, one example of each step at a time.

  Args:
    stream: int64[S, B], examples of each step, longest first; -1 where there is none.
    sizes: int32[S, B], their tokens.
    images: distinct images of each example.
    length: tokens of a row.
    max_images: tiles of distinct images of a row, or None.

  Returns:
    (int64[S, B] row of each example, -1 where there is none; tokens of the fullest row).
  """
  steps, batch_size = stream.shape
  all_steps = np.arange(steps)
  limited = max_images is not None
  counts = np.where(stream >= 0, images.places[stream], 0)
  shared = _shared_images(stream, images) if limited else {}
  rows_with: dict[tuple[int, int], set[int]] = {}  # (step, shared image) -> rows that have it
  free_tokens = np.full((steps, batch_size), length, np.int64)
  free_images = np.full((steps, batch_size), max_images if limited else 0, np.int64)
  row_of = np.full((steps, batch_size), -1, np.int64)
  columns = 1  # the most rows that a step has opened, and one more
  for k in range(batch_size):
    fits = free_tokens[:, :columns] >= sizes[:, k, None]
    added = counts[:, k].copy()
    if limited:
      fits_tokens, fits = fits, fits & (free_images[:, :columns] >= added[:, None])
    row = np.argmax(fits, axis=1)
    for s, ids in shared.get(k, ()):
      saved = np.zeros(columns, np.int64)
      for image in ids:
        saved[list(rows_with.get((s, image), ()))] += images.tiles_of(image)
      row[s] = np.argmax(fits_tokens[s] & (free_images[s, :columns] + saved >= counts[s, k]))
      added[s] -= saved[row[s]]
      for image in ids:
        rows_with.setdefault((s, image), set()).add(int(row[s]))
    free_tokens[all_steps, row] -= sizes[:, k]
    if limited:
      free_images[all_steps, row] -= added
    row_of[:, k] = np.where(stream[:, k] >= 0, row, -1)
    columns = min(max(columns, int(row.max()) + 2), batch_size)
  return row_of, length - int(free_tokens.min())


def _shared_images(stream: np.ndarray, images: ImageSets) -> dict[int, list[tuple[int, list[int]]]]:
  """Finds images that several examples of a step show: column -> [(step, its shared images)]."""
  step_of, column = np.nonzero(stream >= 0)
  index, image = images.gather(stream[step_of, column])
  pair = step_of[index] * (int(images.ids.max(initial=0)) + 1) + image
  _, inverse, times = np.unique(pair, return_inverse=True, return_counts=True)
  shared: dict[int, list[tuple[int, list[int]]]] = {}
  last = None
  for place in np.flatnonzero(times[inverse] > 1):
    if index[place] != last:
      last = index[place]
      ids: list[int] = []
      shared.setdefault(int(column[last]), []).append((int(step_of[last]), ids))
    ids.append(int(image[place]))
  return shared


def _distinct_images(
  row: np.ndarray, examples: np.ndarray, images: ImageSets, num_rows: int
) -> np.ndarray:
  """Returns int32[num_rows], tiles of each row's distinct images, from the row of each example."""
  index, image = images.gather(examples)
  num_images = int(images.ids.max(initial=0)) + 1
  pairs = np.unique(row[index] * num_images + image)
  tiles = images.tiles_of(pairs % num_images)
  return np.bincount(pairs // num_images, tiles, minlength=num_rows).astype(np.int32)


def _fingerprints(order: np.ndarray, sizes: np.ndarray, batch_size: int) -> np.ndarray:
  """Returns uint32[S+1], checksums of the numbers and lengths of the examples before each step."""
  pairs = np.stack([order, sizes], axis=1).astype("<i8")
  sums = [0]
  for start in range(0, len(pairs), batch_size):
    sums.append(zlib.crc32(pairs[start : start + batch_size].tobytes(), sums[-1]))
  return np.array(sums, np.uint32)


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
