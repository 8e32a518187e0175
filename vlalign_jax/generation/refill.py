"""Answers to more prompts than there are slots: whenever answers have ended, others begin."""

import collections
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vlalign_jax.generation import decoder
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.slots import Slots


class Batch(NamedTuple):
  """Prompts on the devices, of which some are to be answered.

  Attributes:
    prompts: a batch with one prompt a row, all batches of one length S.
    streams: int32[rows], numbers that choose the random numbers of each row.
    wanted: row -> the name that its answers are given; the same on all hosts.
  """

  prompts: dict
  streams: jax.Array
  wanted: dict[int, Hashable]


def answer(
  programs: Slots,
  params,
  batches: Iterable[Batch],
  slots: int,
  length: int,
  seed,
  counts: collections.Counter | None = None,
) -> Iterator[tuple[Any, Generated]]:
  """Answers prompts, and yields the answers to each when all of its samples have ended.

  The host looks every few tokens at which samples have ended. All hosts are given the same tokens,
  so they fill the same slots.

  Args:
    programs: of `slots.make_slots`.
    params: nested dict of all parameters.
    batches: taken as slots get free.
    slots: B, a multiple of the blocks of rows.
    length: S, tokens of a row.
    seed: of all random numbers.
    counts: is added the number of decode "steps", of "prefills" and of "prompts".

  Yields:
    (name, Generated of numpy arrays without the axis of prompts).
  """
  counts = collections.Counter() if counts is None else counts
  state = programs.empty(slots, length)
  waiting = _rows(batches)
  newest: tuple[Batch, int] | None = next(waiting, None)
  names: list[Hashable] = [None] * slots
  free = _by_block(range(slots), slots, programs.blocks)
  answers = no_answers(slots, programs)
  while True:
    while newest is not None and any(free):
      batch, rows = newest[0], []
      most = max(map(len, free))
      size = next(n for n in programs.refill_sizes(slots, length) if n <= most)
      rows, places = np.zeros((2, programs.blocks, size), np.int32)
      places[:] = slots
      for number, block in np.ndindex(size, programs.blocks):
        if newest is None or newest[0] is not batch or not free[block]:
          continue
        slot, row = free[block].pop(0), newest[1]
        rows[block, number], places[block, number] = row, slot
        names[slot] = batch.wanted[row]
        newest = next(waiting, None)
      given = rows.reshape(-1), places.reshape(-1)
      state = programs.refill(params, state, batch.prompts, batch.streams, *given)
      taken = given[1][given[1] < slots]
      _clear(answers, taken, programs.pad_id)
      counts.update(prefills=1, prompts=len(taken))
      del batch
    taken = np.setdiff1d(np.arange(slots), np.concatenate([*map(np.asarray, free)]).astype(int))
    if not len(taken):
      return
    state, given, done, steps = programs.decode(params, state, seed)
    given, done, steps = jax.device_get((given, done, steps))
    counts.update(steps=int(steps))
    _append(answers, given)
    finished = taken[done[taken].all(axis=1)]
    for block, ended in enumerate(_by_block(finished, slots, programs.blocks)):
      free[block] += ended
    for slot in finished:
      yield names[slot], Generated(*(array[slot].copy() for array in answers))


def _rows(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
  for batch in batches:
    for row in batch.wanted:
      yield batch, row


def _by_block(slots: Iterable[int], count: int, blocks: int) -> list[list[int]]:
  """Returns which of the slots each block of rows has."""
  found: list[list[int]] = [[] for _ in range(blocks)]
  for slot in slots:
    found[int(slot) * blocks // count].append(int(slot))
  return found


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
