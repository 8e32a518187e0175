"""Tests that prompts are what training puts before an answer, and stop tokens what follows one."""

import types

import numpy as np
import pytest

from tests.data import test_encode
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.encode import encode
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.plan import ImageSets, plan_batches
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline.prompts import (
  encode_prompt,
  record_numbers,
  row_lengths,
  stop_tokens,
)

PATCHES = 4


def record_of(turns, images, answers=()) -> Record:
  paths = tuple(f"{number}.jpg" for number in range(images))
  return Record("data/test.json", 3, "x", paths, tuple(turns), answers)


def prompt_of(record, template, tokenizer, max_length=100_000):
  image = tokenizer.convert_tokens_to_ids("<image>")
  return encode_prompt(record, template, tokenizer, OneTile(image, PATCHES), max_length)


@pytest.mark.parametrize("answer", ["A cat and two dogs.", " leading", "\n猫", "</s>"])
@pytest.mark.parametrize(("template", "name"), test_encode.PAIRS)
def test_is_what_training_puts_before_the_answer(template, name, answer):
  tokenizer = test_encode.TOKENIZERS[name]
  before = test_encode.NORMAL[:2]
  question = "And here?\n<image>"
  trained = record_of([*before, Turn(question, answer)], 2)
  image = tokenizer.convert_tokens_to_ids("<image>")
  example = encode(trained, template, tokenizer, OneTile(image, PATCHES), 100_000).example
  learned = np.flatnonzero(example.loss_mask)
  gaps = np.flatnonzero(np.diff(learned) > 1)
  start = int(learned[gaps[-1] + 1]) + 1  # where the last answer begins
  asked = [*before, Turn(question, None)]
  for record in (trained, record_of(asked, 2), record_of(asked, 2, ("yes", "no"))):
    prompt = prompt_of(record, template, tokenizer).example
    np.testing.assert_array_equal(prompt.tokens, example.tokens[:start])
    np.testing.assert_array_equal(prompt.positions, np.arange(start))
    assert prompt.images == trained.images
    assert not prompt.loss_mask.any()
    assert prompt.tokens.dtype == prompt.positions.dtype == np.int32


def test_a_prompt_that_does_not_fit_is_not_cut():
  tokenizer = test_encode.TOKENIZERS["first"]
  record = record_of([Turn("<image>\nWhat is in the image?", None)], 1)
  length = len(prompt_of(record, "vicuna", tokenizer).example.tokens)
  assert prompt_of(record, "vicuna", tokenizer, length).counts == (0,)
  encoded = prompt_of(record, "vicuna", tokenizer, length - 1)
  assert encoded.example is None
  assert encoded.counts == (1,)


def test_earlier_questions_need_answers():
  tokenizer = test_encode.TOKENIZERS["first"]
  with pytest.raises(InputError, match='"x".*turn 1 of 2 has no answer'):
    prompt_of(record_of([Turn("One?", None), Turn("Two?", None)], 0), "vicuna", tokenizer)


@pytest.mark.parametrize(("template", "name"), [*test_encode.PAIRS, ("plain", "first")])
def test_stop_tokens_are_the_template_s_and_the_model_s(template, name):
  tokenizer = test_encode.TOKENIZERS[name]
  generation = types.SimpleNamespace(eos_token_id=[7, 9])
  source = types.SimpleNamespace(tokenizer=tokenizer, generation=generation)
  image = tokenizer.convert_tokens_to_ids("<image>")
  asked = "<image>\nA?" if template == "plain" else "A?"
  record = record_of([Turn(asked, "word")], template == "plain")
  example = encode(record, template, tokenizer, OneTile(image, 1), 1000).example
  learned = example.targets[example.loss_mask > 0]
  special = {tokenizer.convert_tokens_to_ids(text) for text in ("<|eot_id|>", "</s>")}
  special |= {tokenizer.eos_token_id}
  first_end = next(token for token in learned.tolist() if token in special - {None})
  expected = {7, 9, tokenizer.eos_token_id, first_end}
  assert stop_tokens(source, template) == tuple(sorted(expected))


def test_stop_tokens_without_a_generation_config():
  tokenizer = test_encode.TOKENIZERS["first"]
  generation = types.SimpleNamespace(eos_token_id=None)
  source = types.SimpleNamespace(tokenizer=tokenizer, generation=generation)
  assert stop_tokens(source, "vicuna") == (tokenizer.eos_token_id,)


def test_the_record_of_each_row():
  lengths = np.array([5, 60, 30, 70, 20, 40, 10])
  images = ImageSets.from_paths([()] * 7)
  order = np.array([6, 4, 2, 5, 1])
  options = {"batch_size": 3, "max_length": 128, "row_multiple": 4, "pack": False}
  plan = plan_batches(order, lengths, images, **options)
  full = [record_numbers(plan, step, tuple(range(4)), 4) for step in range(2)]
  assert sorted(full[0].tolist()) == [-1, 2, 4, 6]
  assert sorted(full[1].tolist()) == [-1, -1, 1, 5]
  parts = [record_numbers(plan, 0, blocks, 4) for blocks in ((0, 3), (1,), (2,))]
  assert parts[0].tolist() == full[0][[0, 3]].tolist()
  assert [parts[1][0], parts[2][0]] == full[0][[1, 2]].tolist()


@pytest.mark.parametrize(
  ("lengths", "expected"),
  [
    ([5], [16]),
    ([16, 17, 40, 90, 700], [32, 48, 96, 704]),
    (range(1, 1001), [256, 512, 752, 1008]),
  ],
)
def test_row_lengths_hold_all_prompts_with_little_padding(lengths, expected):
  assert row_lengths(np.array(lengths)) == expected
