"""The state that the host keeps between rollouts: a queue of scores, and the KL coefficient."""

import math

import numpy as np
import pytest

from vlalign_jax.losses import kl
from vlalign_jax.losses.score_queue import ScoreQueue


def test_scores_are_normalized_by_the_last_ones():
  rng = np.random.default_rng(0)
  queue, seen = ScoreQueue(size=10, scale=10.0), []
  for n in (4, 4, 4, 25):
    scores = (3 + 2 * rng.normal(size=n)).astype(np.float32)
    seen = (seen + scores.astype(np.float64).tolist())[-10:]
    expected = (scores - np.mean(seen)) / np.std(seen) * 10
    normalized = queue.normalize(scores)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    queue = ScoreQueue(10, 10.0, queue.scores.tolist())  # as saved and restored


def test_scores_that_are_not_numbers_stay_out():
  queue = ScoreQueue()
  normalized = queue.normalize(np.array([[1.0, np.nan], [np.inf, 3.0]]))
  np.testing.assert_array_equal(normalized, np.float32([[-10, np.nan], [np.inf, 10]]))
  assert queue.scores.tolist() == [1, 3]
  assert np.isnan(queue.normalize(np.array([np.nan]))).all()
  assert queue.scores.tolist() == [1, 3]


def test_equal_scores_are_zero():
  assert not ScoreQueue().normalize(np.full(7, 0.1)).any()
  assert ScoreQueue().normalize(np.array([5.0])) == 0


@pytest.mark.parametrize(
  ("divergence", "factor"),
  [(6.0, 1.0), (6.6, 1.0 + 0.1 * 64 / 1000), (60.0, 1.0128), (0.0, 0.9872), (math.nan, 1.0)],
)
def test_the_coefficient_follows_the_divergence(divergence, factor):
  assert kl.next_coefficient(0.2, divergence, 64, target=6.0, horizon=1000) == pytest.approx(
    0.2 * factor
  )
  assert kl.next_coefficient(0.2, divergence, 64, target=None, horizon=1000) == 0.2
