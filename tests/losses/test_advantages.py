"""Rewards and advantages of tokens, against definitions in float64, DeepSpeed-Chat and TRL."""

import functools

import jax
import numpy as np
import pytest

from tests.losses import trl_groups
from tests.losses.rollouts import (
  ADVANTAGES,
  ENDED,
  GROUP,
  GROUP_ARRAYS,
  GROUP_LOGPS,
  GROUP_MASK,
  GROUP_REFERENCE,
  GROUP_SCORES,
  MASK,
  OLD,
  REFERENCE,
  RETURNS,
  SCORED,
  SCORES,
  VALUES,
  B,
  M,
  N,
  answers,
  close,
  dirty,
  placed,
)
from vlalign_jax.errors import InputError
from vlalign_jax.losses import advantages, kl


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 1.0, 8.0])
def test_estimates_of_kl(scale):
  reference = (OLD + scale * np.random.default_rng(5).normal(size=OLD.shape)).astype(np.float32)
  r = reference.astype(np.float64) - OLD
  assert np.array_equal(kl.estimate(OLD, reference, "k1"), (OLD - reference))
  # The difference loses digits of small r in float64, too; the series does not.
  k3 = np.where(np.abs(r) < 1e-3, r**2 / 2 * (1 + r / 3 + r**2 / 12), np.expm1(r) - r)
  computed = kl.estimate(OLD, reference, "k3")
  # The difference of float32 log-probabilities is exact only where they are close.
  np.testing.assert_allclose(computed, k3, rtol=1e-6 if scale < 8 else 4e-6)
  gradient = jax.grad(lambda x: kl.estimate(x, reference, "k3").sum())(OLD)
  close(gradient, -np.expm1(r), 2e-6)


def test_estimates_are_unbiased_where_the_policy_samples():
  """The mean of each estimate under the policy is the divergence."""
  logits = np.random.default_rng(5).normal(size=(2, 5)).astype(np.float32)
  policy, reference = np.asarray(jax.nn.log_softmax(logits, axis=1))
  exact = (np.exp(policy) * (policy - reference)).sum()
  for kind in kl.KINDS:
    computed = kl.estimate(policy[None], reference[None], kind)[0]
    assert (np.exp(policy) * computed).sum() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_scores_are_placed_at_the_last_token(clip):
  estimates = (OLD - REFERENCE).astype(np.float32)
  computed = jax.jit(advantages.place_scores)(SCORES, dirty(estimates), MASK, kl_coef=0.1)
  if clip is not None:
    computed = advantages.place_scores(SCORES, dirty(estimates), MASK, kl_coef=0.1, clip=clip)
    assert (np.abs(SCORES) > clip).any()
  expected = {}
  for n, k in answers(estimates):
    expected[n] = -0.1 * k
    expected[n][-1] += SCORES[n] if clip is None else min(max(SCORES[n], -clip), clip)
  close(computed, placed(expected))


def test_a_missing_end_token_is_penalized():
  computed = advantages.penalize_missing_eos(SCORES, ENDED, 1.5)
  assert np.array_equal(computed[ENDED], SCORES[ENDED])
  assert np.array_equal(computed[~ENDED], SCORES[~ENDED] - np.float32(1.5))
  assert len(set(ENDED)) == 2


def sum_of_errors(rewards, values, gamma, lam):
  """Computes advantages by definition (Schulman et al. 2016, equations 11 and 16)."""
  following = np.append(values[1:], 0.0)
  deltas = rewards + gamma * following - values
  return [
    sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
    for t in range(len(deltas))
  ]


def reverse_loop(rewards, values, gamma, lam):
  """Computes advantages like DeepSpeed-Chat, from the last token to the first."""
  last, backwards = 0.0, []
  for t in reversed(range(len(rewards))):
    following = values[t + 1] if t + 1 < len(values) else 0.0
    last = rewards[t] + gamma * following - values[t] + gamma * lam * last
    backwards.append(last)
  return backwards[::-1]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("formula", [sum_of_errors, reverse_loop])
def test_advantages_and_returns(gamma, lam, formula):
  compute = jax.jit(functools.partial(advantages.gae, gamma=gamma, lam=lam))
  computed = compute(dirty(RETURNS), dirty(VALUES), MASK)
  expected = {n: formula(r, v, gamma, lam) for n, r, v in answers(RETURNS, VALUES)}
  close(computed[0], placed(expected))
  close(computed[1], placed({n: expected[n] + v for n, v in answers(VALUES)}))


def test_with_lambda_one_returns_are_discounted_sums():
  _, computed = advantages.gae(RETURNS, VALUES, MASK, gamma=0.9, lam=1.0)
  expected = {
    n: [sum(0.9**k * x for k, x in enumerate(r[t:])) for t in range(len(r))]
    for n, r in answers(RETURNS)
  }
  close(computed, placed(expected))


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_whitening(offset):
  x = (3 * ADVANTAGES + offset).astype(np.float32)
  real = x[MASK].astype(np.float64)
  expected = np.zeros((N, M))
  expected[MASK] = (real - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)
  close(jax.jit(advantages.whiten)(dirty(x), MASK), expected)


def test_rloo_equals_trl_and_the_mean_of_the_others():
  estimates = kl.estimate(GROUP_LOGPS, GROUP_REFERENCE, "k1")
  rewards = advantages.place_scores(GROUP_SCORES.ravel(), estimates, GROUP_MASK, kl_coef=0.3).sum(1)
  computed = jax.jit(advantages.rloo)(rewards.reshape(B, GROUP), SCORED)
  expected = trl_groups.advantages(
    trl_groups.RLOO, GROUP_MASK, GROUP_ARRAYS, GROUP, beta=0.3
  ).reshape(B, GROUP)
  # Rewards are about 50, and their differences have the rounding errors of 50.
  np.testing.assert_allclose(computed, expected, rtol=1e-6, atol=1e-6 * 50)
  scores = GROUP_SCORES[0].astype(np.float64)
  others = [np.delete(scores, i).mean() for i in range(GROUP)]
  np.testing.assert_allclose(
    advantages.rloo(GROUP_SCORES, SCORED)[0], scores - others, atol=1e-6 * 50
  )


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_grpo_equals_trl(scale_by_std):
  compute = jax.jit(functools.partial(advantages.grpo, scale_by_std=scale_by_std))
  kind = "group" if scale_by_std else "none"
  expected = trl_groups.advantages(
    trl_groups.GRPO, GROUP_MASK, GROUP_ARRAYS, GROUP, scale_rewards=kind
  )
  computed = np.asarray(compute(GROUP_SCORES, SCORED)).ravel()
  np.testing.assert_allclose(computed, expected, rtol=1e-6, atol=1e-6 * 50)
  compared = SCORED & np.array([[True], [True], [False], [False]])
  assert np.array_equal(computed != 0, compared.ravel())
  near = np.where(SCORED, GROUP_SCORES - 50, 0).astype(np.float32)
  expected = trl_groups.advantages(
    trl_groups.GRPO,
    GROUP_MASK,
    GROUP_ARRAYS | {"scores": np.where(SCORED, near, np.nan).ravel()},
    GROUP,
    scale_rewards=kind,
  )
  close(np.ravel(compute(near, SCORED)), expected)


def test_a_single_token_and_equal_advantages_whiten_to_zero():
  mask = np.zeros((2, 3), bool)
  mask[0, 1] = True
  assert not np.any(advantages.whiten(np.full((2, 3), 4.0, np.float32), mask))
  assert not np.any(advantages.whiten(np.full((2, 3), 4.0, np.float32), ~np.zeros_like(mask)))


def test_an_unknown_estimator_is_refused():
  with pytest.raises(InputError, match="ppo.kl_estimator='k2': choose one of k1, k3"):
    kl.estimate(OLD, OLD, "k2")
