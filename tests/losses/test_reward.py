"""The reward model's loss and metrics, against TRL's RewardTrainer and numpy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.losses import trl_losses
from vlalign_jax.losses import reward

LENGTHS = [2, 5, 3, 1, 0, 4, 2, 5]  # answers per example; one alone is not a ranking
K = max(LENGTHS)


def make_scores(seed: int = 0, scale: float = 2.0):
  """Returns scores float32[N, K], nan where there is no answer, and valid bool[N, K]."""
  rng = np.random.default_rng(seed)
  valid = np.arange(K) < np.array(LENGTHS)[:, None]
  scores = (scale * rng.normal(size=valid.shape) + 1).astype(np.float32)
  return np.where(valid, scores, np.nan).astype(np.float32), valid


def plackett_luce(scores, margin=0.0):
  """Returns -log of the probability to draw answers in this order, from float64 scores."""
  total = torch.zeros((), dtype=torch.float64)
  for i in range(len(scores) - 1):
    rivals = scores[i + 1 :] + margin
    total = total + torch.logsumexp(torch.cat([scores[i : i + 1], rivals]), 0) - scores[i]
  return total


@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 3.0, 1.0]])
@pytest.mark.parametrize("center_rewards_coefficient", [0.0, 0.01, 1.0])
def test_pairs_equal_trl(margin, center_rewards_coefficient):
  scores = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32) * 3
  expected, expected_metrics = trl_losses.reward(
    scores, margin=margin, center_rewards_coefficient=center_rewards_coefficient or None
  )
  # Pairs padded to longer lists, and an example without a pair.
  padded = np.full((5, K), np.nan, np.float32)
  padded[:4, :2] = scores
  margins = None if margin is None else np.array([*margin, 7.0], np.float32)
  total, count = reward.loss(
    padded, ~np.isnan(padded), margin=margins, center_rewards_coefficient=center_rewards_coefficient
  )
  assert count == 4
  assert total / count == pytest.approx(expected, rel=1e-5)
  metrics = {
    key: total / count for key, (total, count) in reward.metrics(padded, padded == padded).items()
  } | reward.extremes(padded, padded == padded)
  assert expected_metrics.pop("num_tokens") == 8
  assert metrics == pytest.approx(expected_metrics, rel=1e-5)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 2.0, 1e4])
def test_rankings_and_their_gradients_equal_float64(scale, margins):
  scores, valid = make_scores(scale=scale)
  margin = np.linspace(0, 2, len(scores)).astype(np.float32) if margins else np.zeros(len(scores))
  variable = torch.tensor(np.where(valid, scores, 0).astype(np.float64), requires_grad=True)
  expected = sum(
    plackett_luce(row[:length], float(m))
    for row, length, m in zip(variable, LENGTHS, margin, strict=True)
  )
  expected.backward()
  margins_or_none = jnp.asarray(margin, jnp.float32) if margins else None
  value_and_grad = jax.jit(
    jax.value_and_grad(lambda x: reward.loss(x, valid, margin=margins_or_none), has_aux=True)
  )
  (total, count), gradient = value_and_grad(scores)
  assert count == sum(length > 1 for length in LENGTHS)
  assert total == pytest.approx(expected.item(), rel=1e-5)
  difference = np.linalg.norm(gradient - variable.grad.numpy())
  assert difference <= 1e-5 * np.linalg.norm(variable.grad)
  assert not gradient[~valid].any()


def test_a_ranking_is_as_likely_as_drawing_it_answer_by_answer():
  scores = np.random.default_rng(3).normal(size=4)
  chances = np.exp(scores) / np.exp(scores).sum()
  total, remaining = 1.0, 1.0
  for chance in chances[:-1]:
    total *= chance / remaining
    remaining -= chance
  loss, _ = reward.loss(scores[None], np.ones((1, 4), bool))
  assert loss == pytest.approx(-np.log(total), rel=1e-5)
  likelihoods = [
    np.exp(-reward.loss(scores[None, list(order)], np.ones((1, 4), bool))[0])
    for order in itertools.permutations(range(4))
  ]
  assert sum(likelihoods) == pytest.approx(1.0, rel=1e-5)


def test_a_pair_of_very_different_scores_still_has_a_gradient():
  # log(1 + x) of small x: 1 - sigmoid would be 0 in float32.
  scores = np.array([[30.0, 0.0]], np.float32)
  valid = np.ones((1, 2), bool)
  (total, _), gradient = jax.value_and_grad(lambda x: reward.loss(x, valid), has_aux=True)(scores)
  assert total == pytest.approx(np.exp(-30.0), rel=1e-5)
  assert gradient[0] == pytest.approx([-np.exp(-30.0), np.exp(-30.0)], rel=1e-5)


def test_centering_adds_the_squared_mean():
  scores, valid = make_scores()
  plain, _ = reward.loss(scores, valid)
  centered, _ = reward.loss(scores, valid, center_rewards_coefficient=0.3)
  ranked = [row[:n].astype(np.float64) for row, n in zip(scores, LENGTHS, strict=True) if n > 1]
  assert centered - plain == pytest.approx(0.3 * sum(4 * r.mean() ** 2 for r in ranked), rel=1e-5)


def test_metrics_count_every_ordered_pair():
  scores, valid = make_scores(1)
  differences = [
    float(row[i]) - float(row[j])
    for row, length in zip(scores, LENGTHS, strict=True)
    for i, j in itertools.combinations(range(length), 2)
  ]
  metrics = reward.metrics(scores, valid)
  correct = sum(x > 0 for x in differences)
  assert 0 < correct < len(differences)
  assert metrics["accuracy"] == (correct, len(differences))
  assert metrics["margin"] == (pytest.approx(sum(differences), rel=1e-5), len(differences))
  mean = scores[valid].astype(np.float64).sum()
  assert metrics["mean_reward"] == (pytest.approx(mean, rel=1e-5), sum(LENGTHS))
  extremes = reward.extremes(scores, valid)
  assert extremes == {"min_reward": np.nanmin(scores), "max_reward": np.nanmax(scores)}


def test_equal_scores_are_not_accurate():
  metrics = reward.metrics(np.ones((2, 3)), np.ones((2, 3), bool))
  assert metrics["accuracy"] == (0, 6)


def test_nothing_to_compare_is_zero():
  valid = np.zeros((2, 3), bool)
  valid[0, 0] = True
  loss = reward.loss(np.full((2, 3), 5.0), valid, center_rewards_coefficient=1.0)
  assert loss == (0, 0)
  assert reward.metrics(np.full((2, 3), 5.0), valid)["accuracy"] == (0, 0)
