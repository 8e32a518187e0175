"""Greedy answers are transformers', token for token."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tests import parity
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling

NEW_TOKENS = 24


def answers(model, rows, **options):
  """(tokens of each answer, whether it ended), of the rows that have any."""
  options = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0} | options
  program = make_generate(model.config, Sampling(**options), pad_id=3)
  found = program(model.params, rows, np.arange(len(rows["tokens"])), 0)
  tokens, lengths = np.asarray(found.tokens)[:, 0], np.asarray(found.lengths)[:, 0]
  assert tokens.shape == (len(rows["tokens"]), options["max_new_tokens"])
  for row, length in zip(tokens, lengths, strict=True):
    assert (row[length:] == 3).all()
  listed = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
  return listed, np.asarray(found.ended)[:, 0].tolist()


@pytest.fixture(scope="module")
def endless(model) -> list[list[int]]:
  """Answers that nothing ends."""
  return [model.torch_answer(prompt, max_new_tokens=NEW_TOKENS) for prompt in model.prompts]


def test_prompts_of_different_lengths_with_several_images_and_none(model, endless):
  found, ended = answers(model, model.rows())
  assert found == endless
  assert len({tuple(answer) for answer in found}) == len(found)
  assert not any(ended)


def test_is_transformers_left_padded_batch(model, endless):
  """Its own answers do not depend on the batch either, so that speeds can be compared."""
  longest = max(len(prompt.tokens) for prompt in model.prompts)
  tokens, mask = torch.zeros((2, len(model.prompts), longest), dtype=torch.long)
  for row, prompt in enumerate(model.prompts):
    tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
    mask[row, longest - len(prompt.tokens) :] = 1
  shown = [model.pictures[path] for prompt in model.prompts for path in prompt.images]
  found = model.torch_model.generate(
    input_ids=tokens,
    attention_mask=mask,
    pixel_values=parity.pixel_values(model.config, shown),
    do_sample=False,
    pad_token_id=0,
    max_new_tokens=NEW_TOKENS,
  )
  assert found[:, longest:].tolist() == endless


def test_rows_end_at_different_times(model, endless):
  stops = (endless[0][0], endless[1][5], endless[2][9])
  expected = [
    model.torch_answer(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops))
    for prompt in model.prompts
  ]
  assert len(expected[0]) == 1
  assert len({len(answer) for answer in expected}) > 2
  found, ended = answers(model, model.rows(empty=2), stop_tokens=stops)
  assert found == [*expected, [], []]
  assert ended == [answer[-1:] != [] and answer[-1] in stops for answer in [*expected, [], []]]


def test_stops_when_all_have_ended(model, endless):
  """Room for 20,000 tokens, of which a few are written."""
  stops = tuple({answer[number] for number, answer in enumerate(endless)})
  found, ended = answers(model, model.rows(), stop_tokens=stops, max_new_tokens=20_000)
  assert all(ended)
  assert max(map(len, found)) <= len(endless)


def test_text_alone(model, endless):
  texts = [number for number, prompt in enumerate(model.prompts) if not prompt.images]
  rows = model.rows([model.prompts[number] for number in texts])
  rows["images"] = rows["images"][:, :0]
  assert answers(model, rows)[0] == [endless[number] for number in texts]


def test_image_features_in_place_of_images(model, endless):
  rows = model.rows()
  features = jax.jit(lambda params, rows: nnx.merge(model.graphdef, params).image_features(rows))
  rows["image_features"] = features(model.params, rows)
  rows["images"] = np.zeros_like(rows["images"])
  assert answers(model, rows)[0] == endless


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(model, endless, penalty):
  options = {"repetition_penalty": penalty, "max_new_tokens": NEW_TOKENS}
  expected = [model.torch_answer(prompt, **options) for prompt in model.prompts]
  assert expected != endless
  assert answers(model, model.rows(), **options)[0] == expected


def test_least_and_suppressed_tokens(model, endless):
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
  assert answers(model, model.rows(), **options)[0] == expected


def test_one_token(model, endless):
  assert answers(model, model.rows(), max_new_tokens=1)[0] == [answer[:1] for answer in endless]
