"""Prompts on fewer slots than prompts get the answers that they get in one batch."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny_models
from tests.generation import tiny_llava
from tests.generation.test_greedy import NEW_TOKENS
from vlalign_jax.generation import refill
from vlalign_jax.generation.decoder import Generated
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.generation.slots import make_slots

SLOTS, PROMPTS = 2, 15
SAMPLED = Sampling(
  40,
  num_return_sequences=3,
  temperature=1.2,
  top_k=100,
  repetition_penalty=1.1,
  min_new_tokens=3,
  stop_tokens=tuple(range(40)),
)


def refilled(model, batches, sampling: Sampling, slots=SLOTS, counts=None) -> tuple[list, list]:
  """Returns (names, Generated of each) as answers end, and checks how often programs compile.

  `slots` is the number of slots for all prompts, or the places of each for a prompt.
  """
  lengths = (tiny_llava.LENGTH,) * slots if isinstance(slots, int) else slots
  programs = make_slots(model.config, sampling, pad_id=3)
  found = refill.answer(programs, model.params, batches, lengths, 5, counts)
  names, answers = zip(*found, strict=True)
  assert programs.decode._cache_size() == 1
  assert programs.refill._cache_size() <= 2 * len(set(lengths))
  return list(names), list(answers)


def batch_of(batch, streams, wanted) -> refill.Batch:
  return refill.Batch(batch, streams, wanted, np.sum(batch["segments"] > 0, axis=1))


def in_one_batch(model, batch, streams, sampling: Sampling) -> Generated:
  program = make_generate(model.config, sampling, pad_id=3)
  return jax.device_get(program(model.params, batch, streams, 5))


def assert_same(answers: Generated, expected: Generated, row: int) -> None:
  for name in ("tokens", "lengths", "ended"):
    np.testing.assert_array_equal(getattr(answers, name), getattr(expected, name)[row])
  for name in ("log_probabilities", "drawn_log_probabilities"):
    np.testing.assert_allclose(getattr(answers, name), getattr(expected, name)[row], atol=1e-5)


@pytest.mark.parametrize("slots", [1, 4, (16, 16, 32, 64)])
def test_samples_are_those_of_one_batch(model, slots):
  batch = model.batch([*model.prompts] * (PROMPTS // 5), empty=1)
  streams = np.arange(PROMPTS + 1, dtype=np.int32) * 7
  expected = in_one_batch(model, batch, streams, SAMPLED)
  assert len(set(expected.lengths.ravel().tolist())) > 10
  assert expected.lengths.max() == SAMPLED.max_new_tokens  # some are cut, and a ring is full
  wanted = {row: f"row {row}" for row in range(PROMPTS)}
  names, answers = refilled(model, [batch_of(batch, streams, wanted)], SAMPLED, slots)
  assert sorted(names) == sorted(wanted.values())
  for name, found in zip(names, answers, strict=True):
    assert_same(found, expected, int(name.removeprefix("row ")))
  if slots != 1:
    assert names != sorted(names, key=lambda name: int(name.removeprefix("row ")))


def test_several_batches_and_rows_without_a_prompt(model):
  """A row without a prompt that is asked for all the same, as hosts may not know, has no tokens."""
  batch = model.batch(empty=1)
  streams = [np.arange(6, dtype=np.int32), np.arange(6, 12, dtype=np.int32)]
  expected = [in_one_batch(model, batch, one, SAMPLED) for one in streams]
  wanted = [{0: (0, 0), 2: (0, 2), 5: (0, 5)}, {4: (1, 4), 1: (1, 1), 3: (1, 3)}]
  given = [batch_of(batch, *of_batch) for of_batch in zip(streams, wanted, strict=True)]
  names, answers = refilled(model, given, SAMPLED)
  assert sorted(names) == [(0, 0), (0, 2), (0, 5), (1, 1), (1, 3), (1, 4)]
  for (number, row), found in zip(names, answers, strict=True):
    assert_same(found, expected[number], row)
  assert not answers[names.index((0, 5))].lengths.any()


def test_decode_steps(model):
  """Slots wait for no other answers: steps are those of the fullest slot, and a few for looks."""
  batch, streams = model.batch([*model.prompts] * 3), np.arange(PROMPTS, dtype=np.int32)
  sampling = Sampling(64, temperature=1.2, stop_tokens=tuple(range(32)))
  lengths = in_one_batch(model, batch, streams, sampling).lengths[:, 0]
  counts = collections.Counter()
  wanted = {row: row for row in range(PROMPTS)}
  refilled(model, [batch_of(batch, streams, wanted)], sampling, 3, counts)
  ends, slots = np.zeros(3, int), make_slots(model.config, sampling)
  for length in lengths:  # each prompt takes the slot that is free first
    ends[ends.argmin()] += -(-int(length) // slots.look_every) * slots.look_every
  assert counts["prompts"] == PROMPTS
  assert ends.max() - slots.look_every < counts["steps"] <= ends.max()
  waiting = sum(lengths[start : start + 3].max() for start in range(0, PROMPTS, 3))
  assert counts["steps"] < 0.8 * waiting


def test_answers_come_as_they_end(model):
  batch, streams = model.batch([*model.prompts] * 3), np.arange(PROMPTS, dtype=np.int32)
  counts, programs = collections.Counter(), make_slots(model.config, SAMPLED, pad_id=3)
  given = [batch_of(batch, streams, {row: row for row in range(PROMPTS)})]
  lengths = (tiny_llava.LENGTH,) * SLOTS
  found = refill.answer(programs, model.params, given, lengths, 5, counts)
  next(found)
  assert counts["prompts"] == SLOTS + 1  # its slot has the next one, and all others wait
  assert len([*found]) == PROMPTS - 1


MODELS = {
  "clip": {},
  "mistral": {"text": tiny_models.MISTRAL_WINDOW},
  "qwen3": {"text": tiny_models.QWEN3_WINDOW},
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_equal_transformers(name, tmp_path):
  model = tiny_llava.make(str(tmp_path), **MODELS[name])
  endless = [model.torch_answer(prompt, max_new_tokens=NEW_TOKENS) for prompt in model.prompts]
  stops = (endless[0][2], endless[1][7], endless[4][15])
  expected = [
    model.torch_answer(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops))
    for prompt in model.prompts
  ]
  assert len(set(map(len, expected))) > 2
  batch, streams = model.batch(), np.arange(5, dtype=np.int32)
  sampling = Sampling(NEW_TOKENS, temperature=0.0, stop_tokens=stops)
  wanted = {row: row for row in range(5)}
  names, answers = refilled(model, [batch_of(batch, streams, wanted)], sampling)
  found = {
    name: answer.tokens[0, : answer.lengths[0]].tolist()
    for name, answer in zip(names, answers, strict=True)
  }
  assert [found[row] for row in range(5)] == expected


def test_images_that_see_each_other_apart_from_text(model):
  """Multi-modal causal attention needs to know the image tokens of the prompt in each slot."""
  config = dataclasses.replace(model.config, mmca=True)
  model = dataclasses.replace(model, config=config)
  batch, streams = model.batch(), np.arange(5, dtype=np.int32)
  expected = in_one_batch(model, batch, streams, SAMPLED)
  wanted = {row: row for row in range(5)}
  for row, found in zip(*refilled(model, [batch_of(batch, streams, wanted)], SAMPLED), strict=True):
    assert_same(found, expected, row)


def test_keys_and_values_in_int8(model):
  """Answers on slots of several lengths are those of one batch, and near those without rounding."""
  batch, streams = model.batch(), np.arange(5, dtype=np.int32)
  rounded = dataclasses.replace(SAMPLED, cache_dtype="int8")
  expected = in_one_batch(model, batch, streams, rounded)
  given = [batch_of(batch, streams, {row: row for row in range(5)})]
  for row, found in zip(*refilled(model, given, rounded, (32, 48)), strict=True):
    assert_same(found, expected, row)
  unrounded = in_one_batch(model, batch, streams, SAMPLED)
  # The prompt itself is read without rounding, so the first token has the same probability.
  gap = np.abs(expected.log_probabilities - unrounded.log_probabilities)
  assert gap[..., 0].max() < 1e-5
  same = np.cumprod(expected.tokens == unrounded.tokens, axis=-1).astype(bool)
  same &= np.arange(SAMPLED.max_new_tokens) < unrounded.lengths[..., None]
  assert same.sum() > 60
  assert 1e-4 < gap[same].mean() < 0.005
