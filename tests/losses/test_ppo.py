"""PPO's losses and metrics, against TRL's trainers, DeepSpeed-Chat's formulas and float64."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch

from tests.losses import trl_groups
from tests.losses.rollouts import (
  ADVANTAGES,
  ENDED,
  GROUP,
  GROUP_ARRAYS,
  GROUP_LOGPS,
  GROUP_MASK,
  GROUP_OLD,
  GROUP_REFERENCE,
  MASK,
  NEW,
  OLD,
  OLD_VALUES,
  RETURNS,
  SCORES,
  VALUES,
  B,
  M,
  N,
  answers,
  close,
  dirty,
)
from vlalign_jax.errors import InputError
from vlalign_jax.losses import advantages, kl, ppo, sums

RECORDED = json.loads((pathlib.Path(__file__).parent / "trl_ppo.json").read_text())


def clipped_policy_loss(new, old, gains, clip):
  """Computes each token's actor loss as DeepSpeed-Chat (Schulman et al. 2017, equation 7)."""
  ratio = torch.exp(new - old)
  return torch.maximum(-gains * ratio, -gains * torch.clamp(ratio, 1 - clip, 1 + clip))


def clipped_value_loss(new, old, returns, clip):
  """Computes each token's critic loss as DeepSpeed-Chat."""
  clamped = torch.minimum(torch.maximum(new, old - clip), old + clip)
  return torch.maximum((new - returns) ** 2, (clamped - returns) ** 2) / 2


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(
  ("ours", "formula", "arrays"),
  [
    (ppo.policy_loss, clipped_policy_loss, (NEW, OLD, ADVANTAGES)),
    (ppo.policy_loss, clipped_policy_loss, (OLD, OLD, ADVANTAGES)),
    (ppo.value_loss, clipped_value_loss, (VALUES, OLD_VALUES, RETURNS)),
  ],
  ids=["policy", "first step", "value"],
)
def test_clipped_losses_and_their_gradients(ours, formula, arrays, clip):
  new, *rest = (torch.tensor(x[MASK].astype(np.float64)) for x in arrays)
  new.requires_grad_()
  expected = formula(new, *rest, clip).sum()
  expected.backward()

  @functools.partial(jax.value_and_grad, has_aux=True)
  def compute(x, *others):
    (total, count), _ = ours(x, *others, MASK, clip=clip)
    return total, count

  (total, count), gradient = jax.jit(compute)(*map(dirty, arrays))
  assert count == MASK.sum()
  assert total == pytest.approx(expected.item(), rel=1e-6, abs=1e-6 * MASK.sum())
  full = np.zeros((N, M))
  full[MASK] = new.grad
  # A ratio has the rounding error of its log-probabilities, 6e-8 of 10.
  close(gradient, full, 2e-6)


@pytest.mark.parametrize("level", ["answer", "sequence"])
def test_levels_and_their_metrics(level):
  """Losses are means over answers; an answer's ratio is the product of its tokens' ratios."""
  (total, count), pairs = ppo.policy_loss(
    dirty(NEW), dirty(OLD), ADVANTAGES[:, :1], MASK, clip=0.2, level=level
  )
  losses, ratios = [], []
  for n, new, old in answers(NEW, OLD):
    difference = new - old if level == "answer" else (new - old).sum(keepdims=True)
    ratio, gain = np.exp(difference), float(ADVANTAGES[n, 0])
    losses.append(np.maximum(-gain * ratio, -gain * np.clip(ratio, 0.8, 1.2)).mean())
    ratios.extend(ratio)
  assert count == len(losses) == N - 1
  assert total == pytest.approx(sum(losses), rel=2e-6)
  metrics = ppo.summary(sums.quotients(pairs))
  assert metrics["val/ratio"] == pytest.approx(np.mean(ratios), rel=1e-6)
  assert metrics["val/ratio_var"] == pytest.approx(np.var(ratios), rel=1e-5)
  assert metrics["policy/approxkl_avg"] == pytest.approx(np.mean(np.log(ratios) ** 2) / 2, rel=1e-5)


def test_the_variance_of_ratios_near_one_is_accurate():
  new = (OLD + 1e-3 * np.random.default_rng(5).normal(size=OLD.shape)).astype(np.float32)
  _, pairs = ppo.policy_loss(new, OLD, ADVANTAGES, MASK)
  ratios = np.exp(new.astype(np.float64) - OLD)[MASK]
  metrics = ppo.summary(sums.quotients(pairs))
  assert metrics["val/ratio_var"] == pytest.approx(ratios.var(), rel=1e-3)


def test_micro_batches_add_up():
  for level in ppo.LEVELS:
    options = {"clip": 0.2, "level": level}
    _, batch = ppo.policy_loss(NEW, OLD, ADVANTAGES, MASK, **options)
    parts = [
      ppo.policy_loss(NEW[part], OLD[part], ADVANTAGES[part], MASK[part], **options)[1]
      for part in (slice(0, 3), slice(3, None))
    ]
    combined = sums.combine(*parts)
    for key, (total, count) in batch.items():
      assert combined[key] == (pytest.approx(float(total), rel=1e-5, abs=1e-6), count)


@pytest.mark.parametrize(
  ("kind", "level", "options"),
  [
    (trl_groups.RLOO, "sequence", {}),
    (trl_groups.GRPO, "answer", {"loss_type": "grpo"}),
    (trl_groups.GRPO, "token", {"loss_type": "bnpo"}),
  ],
)
def test_losses_of_groups_equal_trl(kind, level, options):
  beta = 0.07 if kind is trl_groups.GRPO else 0.0
  each = np.random.default_rng(5).normal(size=B * GROUP).astype(np.float32)
  expected, expected_gradient, trl_metrics = trl_groups.loss(
    kind, GROUP_MASK, GROUP_ARRAYS, GROUP_OLD, each, beta=beta, **options
  )

  @jax.jit
  def compute(logps):
    (total, count), pairs = ppo.policy_loss(
      logps,
      GROUP_OLD,
      each[:, None],
      GROUP_MASK,
      clip=trl_groups.EPSILON,
      level=level,
    )
    penalty = kl.estimate(logps, GROUP_REFERENCE, "k3")
    if beta:
      penalties, count_again = ppo.average(penalty, GROUP_MASK, level=level)
      total += beta * penalties * count / count_again
    return total / count, sums.quotients(pairs | {"kl": ppo.average(penalty, GROUP_MASK)})

  (loss, metrics), gradient = jax.value_and_grad(compute, has_aux=True)(GROUP_LOGPS)
  assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)  # losses of tokens cancel
  close(gradient, expected_gradient, 2e-6)
  assert metrics["policy/clipfrac_avg"] == pytest.approx(trl_metrics["clip_ratio/region_mean"])
  assert metrics["policy/clipfrac_avg"] > 0
  if beta:
    assert metrics["kl"] == pytest.approx(trl_metrics["kl"], rel=1e-6)


@pytest.mark.parametrize("kind", kl.KINDS)
def test_a_rollout_and_its_updates_equal_trl(kind):
  arguments, run = RECORDED["arguments"], RECORDED["runs"][kind]
  rollout = {
    key: np.asarray(x, bool if key == "ended" else None) for key, x in RECORDED["rollout"].items()
  }
  logps, reference, values, scores = (
    rollout[key].astype(np.float32) for key in ("logps", "reference", "values", "scores")
  )
  lengths, ended = rollout["lengths"], rollout["ended"]
  n, longest = logps.shape
  mask = np.arange(longest) < lengths[:, None]
  # TRL puts the score, and a value, one position after the end token where there is one.
  longer = np.arange(longest) < lengths[:, None] + 1
  estimates = np.where(mask, kl.estimate(logps, reference, kind), 0)
  scores = advantages.penalize_missing_eos(scores, ended, arguments["missing_eos_penalty"])
  rewards = advantages.place_scores(scores, estimates, longer, kl_coef=arguments["kl_coef"])
  gains, returns = advantages.gae(
    rewards, values, longer, gamma=arguments["gamma"], lam=arguments["lam"]
  )
  close(gains, run["advantages"])
  whitened = advantages.whiten(gains, mask)
  close(whitened, run["whitened"])

  coefficients = dict.fromkeys(("kl_coef", "first_coefficient"), arguments["kl_coef"])
  # TRL's metrics of scores include the penalty of a missing end token, which is 0 by default.
  objective = sums.quotients(
    ppo.objective(scores, scores, estimates, logps, mask, ended, **coefficients)
  )
  expected = run["metrics"]
  # TRL adds log-probabilities of 1 for padding.
  expected["objective/entropy"] += (~mask).sum() / n
  names = [key for key in expected if key.startswith("objective/")] + ["val/num_eos_tokens"]
  assert len(names) == 6
  assert {key: float(objective[key]) for key in names} == pytest.approx(
    {key: expected[key] for key in names}, rel=1e-6
  )

  updates = []
  for epoch, order in enumerate(run["permutations"]):
    for rows in np.split(np.asarray(order), 2):
      new, value = (
        rollout[key][epoch][rows].astype(np.float32) for key in ("new_logps", "new_values")
      )
      _, policy = ppo.policy_loss(
        new, logps[rows], whitened[rows], mask[rows], clip=arguments["cliprange"]
      )
      _, critic = ppo.value_loss(
        value, values[rows], returns[rows], longer[rows], clip=arguments["cliprange_value"]
      )
      # TRL averages these two over padding, too, where the ratio is 1.
      padding = (~mask[rows]).sum()
      for key, extra in (("policy/approxkl_avg", 0), ("val/ratio", padding)):
        policy[key] = (policy[key][0] + extra, policy[key][1] + padding)
      updates.append(sums.quotients(policy | critic))
  names = ["loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg"]
  names += ["val/clipfrac_avg", "val/ratio"]
  averages = {key: np.mean([update[key] for update in updates]) for key in names}
  # The absolute tolerance is for losses of tokens that cancel.
  assert averages == pytest.approx({key: expected[key] for key in names}, rel=1e-6, abs=2e-7)


def test_without_tokens_everything_is_zero():
  nothing = np.zeros_like(MASK)
  nan = np.full((N, M), np.nan, np.float32)
  for x in (*advantages.gae(nan, nan, nothing), advantages.whiten(nan, nothing)):
    assert not np.any(x)
  assert not np.any(advantages.place_scores(SCORES, nan, nothing, kl_coef=0.1))

  def policy(x, level):
    result = ppo.policy_loss(x, nan, nan, nothing, level=level)
    return result[0][0], result

  for level in ppo.LEVELS:
    gradient, (loss, metrics) = jax.grad(policy, has_aux=True)(nan, level)
    assert loss == (0, 0)
    assert not np.any([*metrics.values()])
    assert not np.any(gradient)
  assert ppo.value_loss(nan, nan, nan, nothing)[0] == (0, 0)
  one = nan[:, 0]
  coefficients = {"kl_coef": 0.1, "first_coefficient": 0.2}
  result = ppo.objective(one, one, nan, nan, nothing, ENDED, **coefficients)
  assert not any(np.any(x) for x in result.values())


def test_an_unknown_level_is_refused():
  with pytest.raises(InputError, match="ppo.loss_level='tokens': choose one of token, answer"):
    ppo.policy_loss(OLD, OLD, OLD, MASK, level="tokens")
