"""The SFT loss and what evaluation reports, against numpy in float64 and plain counting."""

import math

import jax
import numpy as np
import pytest

from vlalign_jax.losses import sft, sums

B, T, D, V = 4, 16, 8, 10
SEGMENTS = 3


def make_batch(seed: int):
  """hidden, kernel, rows; the targets are mostly what the model would say."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  kernel = rng.normal(size=(D, V)).astype(np.float32)
  greedy = np.argmax(hidden @ kernel, axis=-1)
  targets = np.where(rng.random((B, T)) < 0.9, greedy, rng.integers(0, V, (B, T)))
  segments = np.sort(rng.integers(0, SEGMENTS + 1, (B, T)), axis=1)[:, ::-1]  # 0 comes last
  segments = np.where(segments > 0, segments.max(1, keepdims=True) + 1 - segments, 0)
  weights = (rng.random((B, T)) < 0.6) & (segments > 0)
  weights[0, segments[0] == 1] = False  # an example that teaches nothing is no example
  rows = {
    "targets": targets.astype(np.int32),
    "segments": segments.astype(np.int32),
    "loss_mask": weights.astype(np.float32),
  }
  return hidden, kernel, rows


def expected(hidden, kernel, rows):
  """The sums of `sft.evaluation`, one example after the other."""
  logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  sums = dict.fromkeys(("loss", "tokens", "correct_tokens", "examples", "exact_examples"), 0.0)
  for b in range(B):
    for segment in range(1, SEGMENTS + 1):
      places = np.flatnonzero((rows["segments"][b] == segment) & (rows["loss_mask"][b] > 0))
      targets = rows["targets"][b, places]
      right = logits[b, places].argmax(-1) == targets
      sums["loss"] -= log_probabilities[b, places, targets].sum()
      sums["tokens"] += len(places)
      sums["correct_tokens"] += right.sum()
      sums["examples"] += len(places) > 0
      sums["exact_examples"] += len(places) > 0 and right.all()
  return sums


@pytest.mark.parametrize(("shards", "chunk"), [(1, 128), (2, 5), (4, 3)])
def test_evaluation_counts_what_a_loop_counts(shards, chunk):
  hidden, kernel, rows = make_batch(0)
  found = sft.evaluation(hidden, kernel, rows, max_segments=SEGMENTS, shards=shards, chunk=chunk)
  wanted = expected(hidden, kernel, rows)
  assert 0 < wanted["exact_examples"] < wanted["examples"] < B * SEGMENTS
  assert found == pytest.approx(wanted, rel=1e-6)
  total, count = sft.loss(hidden, kernel, rows, shards=shards, chunk=chunk)
  assert (total, count) == (pytest.approx(wanted["loss"], rel=1e-6), wanted["tokens"])


def test_evaluation_of_several_batches_is_that_of_all_examples():
  batches = [make_batch(seed) for seed in range(3)]
  wanted = {}
  for batch in batches:
    wanted = {key: wanted.get(key, 0) + value for key, value in expected(*batch).items()}
  evaluate = jax.jit(lambda *batch: sft.evaluation(*batch, max_segments=SEGMENTS))
  found = sft.summary(sums.total(evaluate(*batch) for batch in batches))
  mean = wanted["loss"] / wanted["tokens"]
  assert found == pytest.approx(
    {
      "loss": mean,
      "perplexity": math.exp(mean),
      "token_accuracy": wanted["correct_tokens"] / wanted["tokens"],
      "exact_match": wanted["exact_examples"] / wanted["examples"],
      "examples": wanted["examples"],
    },
    rel=1e-6,
  )


def test_nothing_to_learn_is_zero():
  hidden, kernel, rows = make_batch(0)
  rows["loss_mask"][:] = 0
  found = sft.evaluation(hidden, kernel, rows, max_segments=SEGMENTS)
  assert set(map(float, found.values())) == {0.0}
