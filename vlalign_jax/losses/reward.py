"""Reward model: loss and metrics of the scores of ranked answers."""

import jax.numpy as jnp

from vlalign_jax.losses import ranking


def loss(scores, valid, *, margin=None, center_rewards_coefficient: float = 0.0):
  """Returns the sum over examples of the ranking's negative log-likelihood, and their number.

  See `ranking.plackett_luce`; two answers make Bradley-Terry. A constant added to all scores does
  not change that likelihood. Centering therefore adds, per example, c * (2 * mean of its scores)^2
  with c = center_rewards_coefficient, which keeps scores around 0. For two answers it is
  c * (s_0 + s_1)^2 (Eisenstein et al. 2023, equation 2; TRL has the same argument).

  Args:
    scores: float[N, K] in the order of the ranking, best first.
    valid: bool[N, K], false where an example has fewer answers; scores there are ignored.
    margin: float32[N] or None, see `ranking.plackett_luce`.
    center_rewards_coefficient: c.

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
  """Computes a batch's metrics, under the names of TRL's RewardTrainer.

  Args:
    scores, valid: as in `loss`.

  Returns:
    Dict of (float32[] sum, float32[] count): `accuracy` (ordered pairs whose better answer has the
    higher score), `margin` (the difference of scores over all pairs), `mean_reward`.
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
  """Returns `min_reward` and `max_reward`, float32[]; inf and -inf if there is no answer.

  Args:
    scores, valid: as in `loss`.
  """
  scores = scores.astype(jnp.float32)
  return {
    "min_reward": jnp.min(scores, where=valid, initial=jnp.inf),
    "max_reward": jnp.max(scores, where=valid, initial=-jnp.inf),
  }
