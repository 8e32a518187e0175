"""Answers to more prompts than there are slots: whenever answers have ended, others begin."""

import collections
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vlalign_jax.generation import decoder
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.slots import Group, Slots, groups_of, refill_sizes


class Batch(NamedTuple):
  """Prompts on the devices, of which some are to be answered.

  Attributes:
    prompts: a batch with one prompt a row.
    streams: int32[rows], numbers that choose the random numbers of each row.
    wanted: row -> the name that its answers are given; the same on all hosts.
    lengths: int[rows], tokens of each prompt; the same on all hosts.
  """

  prompts: dict
  streams: jax.Array
  wanted: Mapping[int, Hashable]
  lengths: np.ndarray


class _Waiting:
  """Prompts that wait for a slot: those of one batch, then those of the next.

  Attributes:
    batch: whose prompts are next; None: none wait.
    rows: of the batch, the longest prompts first.
  """

  def __init__(self, batches: Iterable[Batch]):
    self._batches = iter(batches)
    self.batch: Batch | None = None
    self.rows: list[int] = []
    self._advance()

  def _advance(self) -> None:
    while not self.rows and (batch := next(self._batches, None)) is not None:
      self.batch = batch
      self.rows = sorted(batch.wanted, key=lambda row: -batch.lengths[row])
    if not self.rows:
      self.batch = None

  def fits(self, length: int) -> bool:
    """Returns whether one of the batch's prompts has at most so many tokens."""
    return self.batch is not None and self.batch.lengths[self.rows[-1]] <= length

  def take(self, batch: Batch, length: int) -> int | None:
    """Returns the row of the longest prompt of the batch that fits, which no longer waits."""
    if self.batch is not batch or not self.fits(length):
      return None
    row = next(row for row in self.rows if batch.lengths[row] <= length)
    self.rows.remove(row)
    self._advance()
    return row


def answer(
  programs: Slots,
  params,
  batches: Iterable[Batch],
  lengths: tuple[int, ...],
  seed,
  counts: collections.Counter | None = None,
) -> Iterator[tuple[Any, Generated]]:
  """Answers prompts, and yields the answers to each when all of its samples have ended.

  They are yielded while the devices decode the next tokens of the others. The host looks every few
  tokens at which samples have ended. All hosts are given the same tokens, so they fill the same
  slots. A slot takes the longest prompt that waits and fits.

  Args:
    programs: of `slots.make_slots`.
    params: nested dict of all parameters.
    batches: taken as slots get free.
    lengths: places for a prompt of each slot of a device, equal ones together.
    seed: of all random numbers.
    counts: is added the number of decode "steps", of "prefills" and of "prompts".

  Yields:
    (name, Generated of numpy arrays without the axis of prompts).

  Raises:
    ValueError: a prompt is longer than the places of all slots.
  """
  counts = collections.Counter() if counts is None else counts
  state, waiting = programs.empty(lengths), _Waiting(batches)
  ended: list[tuple[Any, Generated]] = []
  slots = programs.blocks * len(lengths)
  names: dict[int, Hashable] = {}  # of the slots that have a prompt
  answers = no_answers(slots, programs)
  while True:
    for group in groups_of(lengths):
      while waiting.batch is not None:
        batch = waiting.batch
        rows, places = _fill(waiting, batch, names, group, len(lengths), programs.blocks)
        taken = places[places < slots]
        if not len(taken):
          break
        picked = programs.pick(batch.prompts, batch.streams, rows, group.length)
        state = programs.refill(params, state, *picked, places, group)
        _clear(answers, taken, programs.pad_id)
        counts.update(prefills=1, prompts=len(taken))
        del batch, picked
    if not names:
      if waiting.batch is not None:
        raise ValueError(f"a prompt has {max(waiting.batch.lengths)} tokens; slots have {lengths}")
      yield from ended
      return
    state, given, done, steps = programs.decode(params, state, seed)
    yield from ended  # whoever takes them works while the devices decode
    given, done, steps = jax.device_get((given, done, steps))
    counts.update(steps=int(steps))
    _append(answers, given)
    ended = [
      (names.pop(slot), Generated(*(array[slot].copy() for array in answers)))
      for slot in [slot for slot in names if done[slot].all()]
    ]


def _fill(
  waiting: _Waiting,
  batch: Batch,
  names: dict[int, Hashable],
  group: Group,
  per_block: int,
  blocks: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Gives prompts of the batch to free slots of a group, as many as a run of `refill` takes.

  Returns:
    (int32[P] rows, int32[P] slots) block by block; a slot past the last one takes nothing.
  """
  none = blocks * per_block
  free = [
    [slot for slot in range(group.first, group.first + group.count) if start + slot not in names]
    for start in range(0, none, per_block)
  ]
  most = min(max(map(len, free)), -(-len(waiting.rows) // blocks))
  size = next((size for size in refill_sizes(group) if size <= most), 0)
  rows, places = np.zeros((blocks, size), np.int32), np.full((blocks, size), none, np.int32)
  for number, block in np.ndindex(size, blocks):
    if len(free[block]) <= number or (row := waiting.take(batch, group.length)) is None:
      continue
    slot = block * per_block + free[block][number]
    rows[block, number], places[block, number] = row, slot
    names[slot] = batch.wanted[row]
  return rows.reshape(-1), places.reshape(-1)


def no_answers(rows: int, programs: Slots) -> Generated:
  """Returns numpy arrays for the answers to prompts, without tokens."""
  sampling = programs.sampling
  shape = rows, sampling.num_return_sequences
  empty = decoder.no_answers(shape, sampling.max_new_tokens, programs.pad_id)
  return jax.tree.map(np.array, empty)


def _clear(answers: Generated, slots: np.ndarray, pad_id: int) -> None:
  answers.tokens[slots] = pad_id
  for array in answers[1:]:
    array[slots] = 0


def _append(answers: Generated, given: Generated) -> None:
  """Appends tokens [B, N, C] to answers [B, N, M]."""
  is_token = np.arange(given.tokens.shape[2]) < given.lengths[..., None]
  slot, sample, number = np.nonzero(is_token)
  place = answers.lengths[slot, sample] + number
  for name in ("tokens", "log_probabilities", "drawn_log_probabilities"):
    getattr(answers, name)[slot, sample, place] = getattr(given, name)[is_token]
  answers.lengths[:] += given.lengths
  answers.ended[:] |= given.ended
