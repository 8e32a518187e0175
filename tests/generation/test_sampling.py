"""Drawn tokens follow exactly the distribution of transformers' warpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process

from vlalign_jax.errors import InputError
from vlalign_jax.generation import sampling as samplings
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling

DRAWS = 20_000
OPTIONS = {
  "temperature 1": {},
  "temperature 0.5": {"temperature": 0.5},
  "temperature 2": {"temperature": 2.0},
  "top_k": {"top_k": 5},
  "top_p": {"top_p": 0.8},
  "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
  "one candidate": {"top_p": 1e-6},
}


def expected_probabilities(log_probabilities, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
  """Returns float64[V] from transformers' warpers, for float32[V]."""
  scores = torch.tensor(np.array(log_probabilities))[None]
  warpers = [logits_process.TemperatureLogitsWarper(temperature)]
  if top_k:
    warpers.append(logits_process.TopKLogitsWarper(top_k))
  if top_p < 1:
    warpers.append(logits_process.TopPLogitsWarper(top_p))
  for warper in warpers:
    scores = warper(None, scores)
  return torch.softmax(scores.double(), dim=-1)[0].numpy()


def chi_square(tokens, probabilities) -> float:
  """Returns the p-value of draws; tokens expected less than five times count as one."""
  counts = np.bincount(tokens, minlength=len(probabilities))
  expected = probabilities * len(tokens)
  assert not counts[probabilities == 0].any()
  rare = (expected < 5) & (expected > 0)
  common = expected >= 5
  counts = [*counts[common], *([counts[rare].sum()] if rare.any() else [])]
  expected = [*expected[common], *([expected[rare].sum()] if rare.any() else [])]
  return 1.0 if len(counts) < 2 else scipy.stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize("name", OPTIONS)
def test_frequencies(name):
  logits = np.random.default_rng(0).normal(0, 2, (2, 40)).astype(np.float32)
  sampling = Sampling(1, num_return_sequences=DRAWS, **OPTIONS[name])
  keys = samplings.row_keys(7, jnp.arange(2), DRAWS)
  wide = jnp.broadcast_to(logits[:, None], (2, DRAWS, 40))
  steps = jnp.array([3, 5])
  draw = jax.jit(lambda wide, keys: samplings.choose(wide, None, keys, steps, sampling))
  tokens, log_probabilities, drawn = jax.device_get(draw(wide, keys))
  for row in range(2):
    probabilities = expected_probabilities(logits[row], **OPTIONS[name])
    assert chi_square(tokens[row], probabilities) > 1e-3
    np.testing.assert_allclose(drawn[row], np.log(probabilities[tokens[row]]), atol=1e-5)
    untempered = np.log(expected_probabilities(logits[row])[tokens[row]])
    np.testing.assert_allclose(log_probabilities[row], untempered, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_nucleus_without_sorting_equals_transformers(top_p):
  logits = np.random.default_rng(1).normal(0, 3, (20, 1, 3000)).astype(np.float32)
  probabilities = jax.nn.softmax(logits, axis=-1)
  nucleus = probabilities >= samplings._nucleus_threshold(probabilities, top_p)
  expected = [expected_probabilities(row[0], top_p=top_p) > 0 for row in logits]
  # The last candidate may differ if the sum is top_p up to rounding.
  assert np.sum(np.asarray(nucleus)[:, 0] != np.array(expected), axis=1).max() <= 1
  assert np.mean(np.asarray(nucleus)[:, 0] == np.array(expected)) > 0.9999


@pytest.fixture(scope="module")
def drawn(model):
  """Returns two tokens of many answers to the prompt with two images, and the settings."""
  settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.95}
  program = make_generate(model.config, Sampling(2, num_return_sequences=4000, **settings))
  batch = model.batch(model.prompts[1:2])
  return np.asarray(program(model.params, batch, np.zeros(1, int), 5).tokens)[0], settings


def test_frequencies_of_a_model(model, drawn):
  tokens, settings = drawn
  log_probabilities = model.torch_log_probabilities(model.prompts[1], tokens[0])
  assert chi_square(tokens[:, 0], expected_probabilities(log_probabilities[0], **settings)) > 1e-3
  most_common = np.bincount(tokens[:, 0]).argmax()
  second = tokens[tokens[:, 0] == most_common, 1]
  assert len(second) > 300
  log_probabilities = model.torch_log_probabilities(model.prompts[1], [most_common, 0])
  assert chi_square(second, expected_probabilities(log_probabilities[1], **settings)) > 1e-3


def test_a_sample_does_not_depend_on_its_batch(model):
  sampling = Sampling(12, num_return_sequences=3, temperature=1.3, stop_tokens=(9, 10, 11, 12))
  program = make_generate(model.config, sampling)
  together = program(model.params, model.batch(), np.arange(5), 0)
  again = program(model.params, model.batch(), np.arange(5), 0)
  other = program(model.params, model.batch(), np.arange(5), 1)
  assert np.array_equal(together.tokens, again.tokens)
  assert not np.array_equal(together.tokens, other.tokens)
  assert len({row.tobytes() for row in np.asarray(together.tokens).reshape(15, 12)}) == 15
  order = np.array([4, 1])  # other rows, other neighbors, other padding
  batch = model.batch([model.prompts[number] for number in order], length=64)
  fewer = program(model.params, batch, order, 0)
  for tokens, number in zip(fewer.tokens, order, strict=True):
    assert np.array_equal(tokens, together.tokens[number])
  sampling = Sampling(20, num_return_sequences=1, temperature=1.3, stop_tokens=(9, 10, 11, 12))
  alone = make_generate(model.config, sampling)(model.params, batch, order, 0)
  for tokens, number in zip(alone.tokens, order, strict=True):
    end = int(together.lengths[number, 0])
    assert np.array_equal(tokens[0, :end], together.tokens[number, 0, :end])


BAD = {
  "max_new_tokens": ({"max_new_tokens": 0}, "generation.max_new_tokens is 0; give more than 0"),
  "samples": ({"num_return_sequences": 0}, "generation.num_return_sequences is 0"),
  "penalty": ({"repetition_penalty": 0.0}, "generation.repetition_penalty is 0.0"),
  "temperature": ({"temperature": -1.0}, "generation.temperature is -1.0; give 0 or more"),
  "temperature nan": ({"temperature": float("nan")}, "generation.temperature is nan"),
  "top_p": ({"top_p": 0.0}, "generation.top_p is 0.0; give more than 0 and at most 1"),
  "top_k": ({"top_k": -1}, "generation.top_k is -1"),
  "least": ({"min_new_tokens": 9}, "generation.min_new_tokens is 9, above"),
  "equal answers": ({"temperature": 0.0, "num_return_sequences": 2}, "gives equal answers"),
  "stop": ({"stop_tokens": (512,)}, "generation.stop_tokens has 512; the model's ids are 0 to 511"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_make_no_sense(model, name):
  options, message = BAD[name]
  with pytest.raises(InputError, match=message):
    make_generate(model.config, Sampling(**{"max_new_tokens": 8} | options))
