"""Packs several tokenized examples and their distinct images into one row of fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlalign_jax.image_slots import TEXT

if TYPE_CHECKING:
  from vlalign_jax.data.encode import Example


def empty_row(length: int, pad_id: int = 0) -> dict[str, np.ndarray]:
  """Returns a row of padding.
  Args:
    length: T, tokens in the row.
    pad_id: the token id of padding.

  Returns:
    tokens, positions, segments, branches, targets, image_slots: int32[T]; loss_mask: float32[T].
  """
  row: dict[str, np.ndarray] = {
    name: np.zeros(length, np.int32) for name in ("positions", "segments", "branches", "targets")
  }
  row["tokens"] = np.full(length, pad_id, np.int32)
  row["loss_mask"] = np.zeros(length, np.float32)
  row["image_slots"] = np.full(length, -1, np.int32)
  return row


def build_row(
  examples: Sequence[Example],
  length: int,
  num_images: int,
  image_token_id: int,
  tokens_per_image: int,
  pad_id: int = 0,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Concatenates examples into one row; an image that several of them show is stored once.

  The images' tiles follow each other in the order of the returned paths. An image token points at
  slot j * P + s, where P is `tokens_per_image`, j the place of its image's first tile and s its
  slot in `Example.pictures`; a slot below 0 stays as it is. If a prompt ends with an image token,
  it begins every answer's branch, and is counted once.

  Args:
    examples: the examples of the row, in order; may be empty.
    length: T, tokens in the row.
    num_images: I, the most tiles of distinct images that the row may have.
    image_token_id: the id that marks image positions in `tokens`.
    tokens_per_image: P, image tokens of one tile; of an image where `pictures` is empty.
    pad_id: the token id of padding.

  Returns:
    (arrays as in `empty_row`, with segments counted from 1; paths of the distinct images in slot
    order, whose tiles are at most I).

  Raises:
    ValueError: the examples do not fit, or an example's image tokens and images disagree.
  """
  row = empty_row(length, pad_id)
  first_tile: dict[str, int] = {}
  tiles = 0
  for example in examples:
    for path, count in example.tiles.items():
      if path not in first_tile:
        first_tile[path] = tiles
        tiles += count
  if tiles > num_images:
    raise ValueError(f"{tiles} tiles of distinct images in a row of {num_images}")
  if not examples:
    return row, ()

  lengths = np.array([len(example.tokens) for example in examples])
  used = int(lengths.sum())
  if used > length:
    raise ValueError(f"{used} tokens in a row of {length}")
  for name in ("tokens", "positions", "branches", "targets", "loss_mask"):
    row[name][:used] = np.concatenate([getattr(example, name) for example in examples])
  row["segments"][:used] = np.repeat(np.arange(1, len(examples) + 1), lengths)

  is_image = row["tokens"][:used] == image_token_id
  start = 0
  for example in examples:
    here = is_image[start : start + len(example.tokens)]
    slots = _slots(example, here, [first_tile[path] for path in example.images], tokens_per_image)
    row["image_slots"][start : start + len(here)][here] = slots
    start += len(here)
  return row, tuple(first_tile)


def _slots(
  example: Example, is_image: np.ndarray, first_tiles: list[int], tokens_per_image: int
) -> np.ndarray:
  """Returns int[n], the slot of each image token, from the first tile of each of the images."""
  one_tile = np.arange(tokens_per_image)
  slots = [p.slots[p.slots != TEXT] for p in example.pictures] or [one_tile] * len(first_tiles)
  slots = [
    np.where(own >= 0, first * tokens_per_image + own, own)
    for own, first in zip(slots, first_tiles, strict=True)
  ]
  expected = sum(map(len, slots))
  shared = example.branches[is_image] == 0
  copies = example.branches[is_image][~shared]
  count = int(np.sum(shared)) + bool(len(copies))
  if count != expected or len(set(copies.tolist())) < len(copies):
    raise ValueError(
      f"{example.where}: {count} image tokens for {len(slots)} images of {expected} tokens in all"
    )
  if not count:
    return np.zeros(0, np.int32)
  return np.concatenate(slots)[np.minimum(np.cumsum(shared) - shared, count - 1)]


def answer_places(
  examples: Sequence[Example], numbers: Sequence[int], max_segments: int, max_answers: int
) -> dict[str, np.ndarray]:
  """Returns the fields of a row of ranked answers that other rows lack.

  Args:
    examples: the examples of the row, in order, as for `build_row`.
    numbers: the number of each example.
    max_segments: S, the most examples of a row.
    max_answers: K, the most answers of an example.

  Returns:
    answers: int32[S, K], the place in the row of the last token of the answer of rank k (0 is the
    best) of segment s + 1; examples: int32[S], the number of its example; -1 where there is none.
  """
  answers = np.full((max_segments, max_answers), -1, np.int32)
  padded = np.full(max_segments, -1, np.int32)
  padded[: len(examples)] = numbers
  start = 0
  for segment, example in enumerate(examples):
    answers[segment, : len(example.answers)] = start + example.answers
    start += len(example.tokens)
  return {"answers": answers, "examples": padded}
