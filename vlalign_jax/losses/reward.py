"""Reward model: the loss of scores of ranked answers, and what is reported of them."""

import jax.numpy as jnp

from vlalign_jax.losses import ranking


def loss(scores, valid, *, margin=None, center_rewards_coefficient: float = 0.0):
  """Sum over examples of the ranking's negative log-likelihood, and the number of examples.

  See `ranking.plackett_luce`; two answers make Bradley-Terry. Centering adds, per example,
  c * (2 * mean of its scores)^2 with c = center_rewards_coefficient; for two
  answers c * (s_0 + s_1)^2
  (Eisenstein et al. 2023, equation 2; TRL's `center_rewards_coefficient`): it chooses, among scores
  that differ by a constant and rank alike, those around 0.

  Args:
    scores: float[N, K] in the order of the ranking, best first.
    valid: bool[N, K], false where an example has fewer answers; these scores do not matter.
    margin: float32[N] or None, see `ranking.plackett_luce`.
    center_rewards_coefficient: weight of the center_rewards_coefficient term.

  Returns:
    (float32[] sum, float32[] number of examples with at least two answers).
  """
  scores = jnp.where(valid, scores, 0).astype(jnp.float32)
  ranked = ranking.is_ranked(valid)
  losses = ranking.plackett_luce(scores, ranking.ordered_pairs(valid), margin)
  if center_rewards_coefficient:
    mean = jnp.sum(scores, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
    losses += jnp.where(ranked, center_rewards_coefficient * (2 * mean) ** 2, 0.0)
  return jnp.sum(losses), jnp.sum(ranked).astype(jnp.float32)


def metrics(scores, valid):
  """What is reported of a batch, under the names of TRL's RewardTrainer.

  Args:
    scores, valid: as in `loss`.

  Returns:
    Dict of (float32[] sum, float32[] count): `accuracy` (pairs whose better answer has the higher
    score, of all ordered pairs), `margin` (by how much, over the same pairs), `mean_reward`.
  """
  scores = jnp.where(valid, scores, 0).astype(jnp.float32)
  above = ranking.ordered_pairs(valid)
  margins = ranking.differences(scores)
  pairs = jnp.sum(above).astype(jnp.float32)
  return {
    "accuracy": (jnp.sum(above & (margins > 0)).astype(jnp.float32), pairs),
    "margin": (jnp.sum(jnp.where(above, margins, 0.0)), pairs),
    "mean_reward": (jnp.sum(scores), jnp.sum(valid).astype(jnp.float32)),
  }


def extremes(scores, valid):
  """Dict of float32[]: `min_reward` and `max_reward`; inf and -inf where there is no answer.

  Args:
    scores, valid: as in `loss`.
  """
  scores = scores.astype(jnp.float32)
  return {
    "min_reward": jnp.min(scores, where=valid, initial=jnp.inf),
    "max_reward": jnp.max(scores, where=valid, initial=-jnp.inf),
  }
