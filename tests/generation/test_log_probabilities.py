"""The sampler's log-probabilities equal those of the training forward pass, and torch's."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import parity
from vlalign_jax import trees
from vlalign_jax.data.encode_preferences import branch
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import lora, vlm

SAMPLING = Sampling(
  10,
  num_return_sequences=3,
  temperature=1.7,
  top_k=100,
  repetition_penalty=1.2,
  stop_tokens=tuple(range(60)),
  suppress=(511, 506),
)


def forward(config, graphdef, params, model, generated):
  """Returns float32[B, N, M] of a forward pass over prompts, with answers as branches of a row."""
  image_token = config.image_token_id
  layout = []
  for prompt, tokens, lengths in zip(
    model.prompts, generated.tokens, generated.lengths, strict=True
  ):
    answers = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
    assert image_token not in np.concatenate(answers)
    layout.append([branch(prompt.tokens, answers, prompt.images, prompt.where)])
  batch = parity.make_rows(config, layout, model.pictures, 96, 2)
  logits = parity.logits(graphdef, params, batch)
  logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  logps = np.take_along_axis(logps, batch["targets"][..., None], axis=-1)[..., 0]
  result = np.zeros(generated.tokens.shape, np.float32)
  for b, lengths in enumerate(generated.lengths):
    for n, length in enumerate(lengths):
      answer = (batch["branches"][b] == n + 1) & (batch["loss_mask"][b] > 0)
      result[b, n, :length] = logps[b, answer]
  return result


def sample(config, params, model, **options):
  program = make_generate(config, SAMPLING, **options)
  generated = jax.device_get(program(params, model.batch(), np.arange(5), 3))
  assert len(set(generated.lengths.ravel().tolist())) > 2
  return generated


def test_equal_the_training_forward_pass_and_torch(model):
  generated = sample(model.config, model.params, model)
  expected = forward(model.config, model.graphdef, model.params, model, generated)
  np.testing.assert_allclose(generated.log_probabilities, expected, atol=1e-4)
  for b, prompt in enumerate(model.prompts):
    for n, length in enumerate(generated.lengths[b]):
      answer = generated.tokens[b, n, :length]
      expected = model.torch_log_probabilities(prompt, answer)[np.arange(length), answer]
      np.testing.assert_allclose(generated.log_probabilities[b, n, :length], expected, atol=1e-4)
  assert (generated.drawn_log_probabilities[generated.log_probabilities != 0] < 0).all()


def test_with_adapters(model):
  config = dataclasses.replace(
    model.config, lora=lora.LoraConfig(rank=2, vision_rank=2, targets="language/layers/|projector/")
  )
  graphdef, fresh = vlm.init_params(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  base = trees.flatten(model.params)
  params = trees.map_paths(
    lambda path, leaf: base.get(path, rng.normal(0, 0.3, leaf.shape).astype(np.float32)), fresh
  )
  generated = sample(config, params, model)
  expected = forward(config, graphdef, params, model, generated)
  without = forward(model.config, model.graphdef, model.params, model, generated)
  np.testing.assert_allclose(generated.log_probabilities, expected, atol=1e-4)
  assert np.abs(generated.log_probabilities - without).max() > 0.1


@pytest.mark.parametrize(("mmca", "window"), [(True, None), (True, 6)])
def test_with_another_attention(mmca, window, model):
  """The cache, one token at a time, gives what answers as branches of one row give."""
  language = dataclasses.replace(model.config.language, sliding_window=window)
  config = dataclasses.replace(model.config, mmca=mmca, language=language)
  graphdef, _ = vlm.abstract_params(config)
  generated = sample(config, model.params, model)
  expected = forward(config, graphdef, model.params, model, generated)
  without = forward(model.config, model.graphdef, model.params, model, generated)
  np.testing.assert_allclose(generated.log_probabilities, expected, atol=1e-4)
  assert np.abs(generated.log_probabilities - without).max() > 0.1


def test_in_bfloat16(model):
  generated = sample(model.config, model.params, model, dtype="bfloat16")
  graphdef, _ = vlm.abstract_params(model.config, dtype="bfloat16")
  expected = forward(model.config, graphdef, model.params, model, generated)
  difference = np.abs(generated.log_probabilities - expected)
  assert difference.max() < 0.3
  assert difference[generated.log_probabilities != 0].mean() < 0.03
