"""Rewards and advantages of sampled tokens.

Arrays are [N, M]: N answers, M tokens of the longest. `mask` bool[N, M] is true for an answer's
tokens, its end token included; they are contiguous and mostly begin at index 0. A row without
tokens is not an answer. Input values outside the mask are ignored, even nan; returned values are 0.
"""

import jax
import jax.numpy as jnp

ESTIMATORS = ("gae", "rloo", "grpo")


def penalize_missing_eos(scores, ended, penalty: float):
  """Returns the scores, minus `penalty` where an answer was cut before its end token.

  Args:
    scores: float32[N].
    ended: bool[N], whether the answer has its end token.
  """
  return scores - jnp.where(ended, 0.0, penalty)


def clip_scores(scores, clip: float | None):
  """Clips scores float32[N] to [-clip, clip]; None: does nothing."""
  return scores if clip is None else jnp.clip(scores, -clip, clip)


def place_scores(scores, kl, mask, *, kl_coef, clip: float | None = None):
  """Computes rewards of tokens: the KL penalty of each, plus the answer's score at its last token.

  r_t = -kl_coef kl_t, + clip(score) at the last token (Stiennon et al. 2020, section 3.4;
  Ouyang et al. 2022, equation 2). Their sum over an answer is the reward that `rloo` compares.

  Args:
    scores: float32[N].
    kl: float32[N, M] of `kl.estimate`.
    mask: bool[N, M].
    kl_coef: float or float32[].
    clip: largest absolute score, or None.

  Returns:
    float32[N, M].
  """
  last = mask & ~_next(mask)
  scores = clip_scores(scores.astype(jnp.float32), clip)
  rewards = -kl_coef * jnp.where(mask, kl, 0.0)
  return rewards + jnp.where(last, scores[:, None], 0.0)


def gae(rewards, values, mask, *, gamma: float = 1.0, lam: float = 0.95):
  """Computes generalized advantage estimates and returns (Schulman et al. 2016).

  delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} (equations 12 and 16).
  V and A are 0 after the last token, where the episode ends. Returns, which the critic is trained
  on, are A_t + V_t.

  Args:
    rewards: float32[N, M] of `place_scores`.
    values: float32[N, M], the critic's expectation before each token.
    mask: bool[N, M].
    gamma: discount per token.
    lam: 1 gives discounted returns minus values, 0 the one-step errors delta_t.

  Returns:
    (float32[N, M] advantages, float32[N, M] returns).
  """
  rewards, values = (jnp.where(mask, x, 0).astype(jnp.float32) for x in (rewards, values))
  deltas = rewards + gamma * _next(values) - values
  decays = jnp.where(_next(mask), gamma * lam, 0.0).astype(jnp.float32)

  def compose(later, earlier):
    """Composes two maps A -> decay * A + delta, given as (decay, delta)."""
    return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

  # log2(M) steps instead of M.
  _, advantages = jax.lax.associative_scan(compose, (decays, deltas), reverse=True, axis=1)
  advantages = jnp.where(mask, advantages, 0.0)
  return advantages, advantages + values


def whiten(advantages, mask):
  """Normalizes advantages to mean 0 and unbiased variance 1 over all tokens (TRL: masked_whiten).

  Args:
    advantages: float32[N, M] of a rollout, before it is split, so that all mini-batches share the
      mean and the variance.
    mask: bool[N, M].

  Returns:
    float32[N, M].
  """
  advantages = jnp.where(mask, advantages, 0).astype(jnp.float32)
  count = jnp.sum(mask)
  mean = jnp.sum(advantages) / jnp.maximum(count, 1)
  centered = jnp.where(mask, advantages - mean, 0.0)
  variance = jnp.sum(centered**2) / jnp.maximum(count - 1, 1)
  return centered * jax.lax.rsqrt(variance + 1e-8)


def rloo(scores, valid):
  """Subtracts from each score the mean of the prompt's other answers (Ahmadian et al. 2024, RLOO).

  Args:
    scores: float32[B, n], rewards of n answers to each prompt, the KL penalty included.
    valid: bool[B, n], false for answers to leave out.

  Returns:
    float32[B, n]; 0 for an answer left out, or the only one of its prompt.
  """
  centered, count = _center(scores, valid)
  # r_i - (sum - r_i) / (n - 1), without the difference of large sums.
  return centered * count / jnp.maximum(count - 1, 1)


def grpo(scores, valid, *, scale_by_std: bool = True):
  """Normalizes each score over the answers to its prompt (Shao et al. 2024, section 4.1.2).

  (r - mean) / (std + 1e-4), std unbiased, as TRL's GRPOTrainer.

  Args:
    scores: float32[B, n], without the KL penalty, which GRPO has in its loss.
    valid: bool[B, n], false for answers to leave out.
    scale_by_std: whether to divide; Liu et al. 2025 (Dr. GRPO) do not.

  Returns:
    float32[B, n]; 0 for an answer left out, or the only one of its prompt.
  """
  centered, count = _center(scores, valid)
  if not scale_by_std:
    return centered
  variance = jnp.sum(centered**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
  return centered / (jnp.sqrt(variance) + 1e-4)


def _center(scores, valid):
  """Returns float32[B, n] scores minus the mean of their row, and int32[B, 1] numbers of scores."""
  scores = jnp.where(valid, scores, 0).astype(jnp.float32)
  count = jnp.sum(valid, axis=1, keepdims=True)
  mean = jnp.sum(scores, axis=1, keepdims=True) / jnp.maximum(count, 1)
  return jnp.where(valid & (count > 1), scores - mean, 0.0), count


def _next(x):
  """Shifts x [N, M] one place to the left; the last place becomes 0 or false."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
