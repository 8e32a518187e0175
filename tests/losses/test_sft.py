"""The SFT loss and evaluation's metrics, against numpy in float64 and plain counting."""

import math

import jax
import numpy as np
import pytest

from vlalign_jax.losses import sft, sums

B, T, D, V = 4, 16, 8, 10
SEGMENTS = 3


def make_batch(seed: int):
  """Returns (hidden, kernel, batch); most targets are the model's greedy choice."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  kernel = rng.normal(size=(D, V)).astype(np.float32)
  greedy = np.argmax(hidden @ kernel, axis=-1)
  targets = np.where(rng.random((B, T)) < 0.9, greedy, rng.integers(0, V, (B, T)))
  segments = np.sort(rng.integers(0, SEGMENTS + 1, (B, T)), axis=1)[:, ::-1]  # 0 comes last
  segments = np.where(segments > 0, segments.max(1, keepdims=True) + 1 - segments, 0)
  weights = (rng.random((B, T)) < 0.6) & (segments > 0)
  weights[0, segments[0] == 1] = False  # an example without learned tokens does not count
  batch = {
    "targets": targets.astype(np.int32),
    "segments": segments.astype(np.int32),
    "loss_mask": weights.astype(np.float32),
  }
  return hidden, kernel, batch


def compute_sums(hidden, kernel, batch):
  """Returns the sums of `sft.evaluation`, computed example by example."""
  logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  sums = dict.fromkeys(("loss", "tokens", "correct_tokens", "examples", "exact_examples"), 0.0)
  for b in range(B):
    for segment in range(1, SEGMENTS + 1):
      places = np.flatnonzero((batch["segments"][b] == segment) & (batch["loss_mask"][b] > 0))
      targets = batch["targets"][b, places]
      right = logits[b, places].argmax(-1) == targets
      sums["loss"] -= log_probabilities[b, places, targets].sum()
      sums["tokens"] += len(places)
      sums["correct_tokens"] += right.sum()
      sums["examples"] += len(places) > 0
      sums["exact_examples"] += len(places) > 0 and right.all()
  return sums


@pytest.mark.parametrize(("shards", "chunk"), [(1, 128), (2, 5), (4, 3)])
def test_evaluation_counts_what_a_loop_counts(shards, chunk):
  hidden, kernel, batch = make_batch(0)
  computed = sft.evaluation(
    hidden, kernel, batch, max_segments=SEGMENTS, shards=shards, chunk=chunk
  )
  expected = compute_sums(hidden, kernel, batch)
  assert 0 < expected["exact_examples"] < expected["examples"] < B * SEGMENTS
  assert computed == pytest.approx(expected, rel=1e-6)
  total, count = sft.loss(hidden, kernel, batch, shards=shards, chunk=chunk)
  assert (total, count) == (pytest.approx(expected["loss"], rel=1e-6), expected["tokens"])


def test_evaluation_of_several_batches_is_that_of_all_examples():
  batches = [make_batch(seed) for seed in range(3)]
  expected = {}
  for batch in batches:
    expected = {key: expected.get(key, 0) + value for key, value in compute_sums(*batch).items()}
  evaluate = jax.jit(lambda *batch: sft.evaluation(*batch, max_segments=SEGMENTS))
  metrics = sft.summary(sums.total(evaluate(*batch) for batch in batches))
  mean = expected["loss"] / expected["tokens"]
  assert metrics == pytest.approx(
    {
      "loss": mean,
      "perplexity": math.exp(mean),
      "token_accuracy": expected["correct_tokens"] / expected["tokens"],
      "exact_match": expected["exact_examples"] / expected["examples"],
      "examples": expected["examples"],
    },
    rel=1e-6,
  )


def test_nothing_to_learn_is_zero():
  hidden, kernel, batch = make_batch(0)
  batch["loss_mask"][:] = 0
  computed = sft.evaluation(hidden, kernel, batch, max_segments=SEGMENTS)
  assert set(map(float, computed.values())) == {0.0}
