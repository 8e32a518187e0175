"""Greedy answers equal transformers', token for token."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tests import parity
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling

NEW_TOKENS = 24


def answers(model, batch, **options):
  """Returns (tokens of each row's answer, whether each ended)."""
  options = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0} | options
  program = make_generate(model.config, Sampling(**options), pad_id=3)
  generated = program(model.params, batch, np.arange(len(batch["tokens"])), 0)
  tokens, lengths = np.asarray(generated.tokens)[:, 0], np.asarray(generated.lengths)[:, 0]
  assert tokens.shape == (len(batch["tokens"]), options["max_new_tokens"])
  for row, length in zip(tokens, lengths, strict=True):
    assert (row[length:] == 3).all()
  tokens = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
  return tokens, np.asarray(generated.ended)[:, 0].tolist()


@pytest.fixture(scope="module")
def endless(model) -> list[list[int]]:
  """Returns answers without stop tokens."""
  return [model.torch_answer(prompt, max_new_tokens=NEW_TOKENS) for prompt in model.prompts]


def test_prompts_of_different_lengths_with_several_images_and_none(model, endless):
  tokens, ended = answers(model, model.batch())
  assert tokens == endless
  assert len({tuple(answer) for answer in tokens}) == len(tokens)
  assert not any(ended)


def test_transformers_left_padded_batch(model, endless):
  """transformers' answers do not depend on the batch either, so that speeds can be compared."""
  longest = max(len(prompt.tokens) for prompt in model.prompts)
  tokens, mask = torch.zeros((2, len(model.prompts), longest), dtype=torch.long)
  for row, prompt in enumerate(model.prompts):
    tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
    mask[row, longest - len(prompt.tokens) :] = 1
  images = [model.pictures[path] for prompt in model.prompts for path in prompt.images]
  answers = model.torch_model.generate(
    input_ids=tokens,
    attention_mask=mask,
    pixel_values=parity.pixel_values(model.config, images),
    do_sample=False,
    pad_token_id=0,
    max_new_tokens=NEW_TOKENS,
  )
  assert answers[:, longest:].tolist() == endless


def test_rows_end_at_different_times(model, endless):
  stops = (endless[0][0], endless[1][5], endless[2][9])
  expected = [
    model.torch_answer(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops))
    for prompt in model.prompts
  ]
  assert len(expected[0]) == 1
  assert len({len(answer) for answer in expected}) > 2
  tokens, ended = answers(model, model.batch(empty=2), stop_tokens=stops)
  assert tokens == [*expected, [], []]
  assert ended == [answer[-1:] != [] and answer[-1] in stops for answer in [*expected, [], []]]


def test_stops_when_all_have_ended(model, endless):
  """Generates a few tokens, with room for 20,000."""
  stops = tuple({answer[number] for number, answer in enumerate(endless)})
  tokens, ended = answers(model, model.batch(), stop_tokens=stops, max_new_tokens=20_000)
  assert all(ended)
  assert max(map(len, tokens)) <= len(endless)


def test_text_alone(model, endless):
  texts = [number for number, prompt in enumerate(model.prompts) if not prompt.images]
  batch = model.batch([model.prompts[number] for number in texts])
  batch["images"] = batch["images"][:, :0]
  assert answers(model, batch)[0] == [endless[number] for number in texts]


def test_image_features_in_place_of_images(model, endless):
  batch = model.batch()
  encode = jax.jit(lambda params, batch: nnx.merge(model.graphdef, params).image_features(batch))
  batch["image_features"] = encode(model.params, batch)
  batch["images"] = np.zeros_like(batch["images"])
  assert answers(model, batch)[0] == endless


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(model, endless, penalty):
  options = {"repetition_penalty": penalty, "max_new_tokens": NEW_TOKENS}
  expected = [model.torch_answer(prompt, **options) for prompt in model.prompts]
  assert expected != endless
  assert answers(model, model.batch(), **options)[0] == expected


def test_min_new_and_suppressed_tokens(model, endless):
  stops = sorted({answer[1] for answer in endless})
  suppress = [endless[0][0], endless[2][3]]
  expected = [
    model.torch_answer(
      prompt,
      max_new_tokens=NEW_TOKENS,
      min_new_tokens=7,
      eos_token_id=stops,
      suppress_tokens=suppress,
    )
    for prompt in model.prompts
  ]
  options = {"min_new_tokens": 7, "stop_tokens": tuple(stops), "suppress": tuple(suppress)}
  assert answers(model, model.batch(), **options)[0] == expected


def test_one_token(model, endless):
  assert answers(model, model.batch(), max_new_tokens=1)[0] == [answer[:1] for answer in endless]
