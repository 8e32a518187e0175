"""What each sampled token earned and how much better that was than expected.

Answers are rows of arrays [N, M]: N answers, M tokens of the longest. `mask` bool[N, M] is true for
an answer's tokens, its end token included; they stand next to each other, mostly at the front. A
row without tokens is no answer. Values at other places do not matter, be they nan, and are 0 in
what is returned.
"""

import jax
import jax.numpy as jnp

ESTIMATORS = ("gae", "rloo", "grpo")


def penalize_missing_eos(scores, ended, penalty: float):
  """Scores, less by `penalty` where an answer was cut before its end token.

  Args:
    scores: float32[N].
    ended: bool[N], whether the end token is there.
  """
  return scores - jnp.where(ended, 0.0, penalty)


def clip_scores(scores, clip: float | None):
  """Scores float32[N] between -clip and clip; as they are if clip is None."""
  return scores if clip is None else jnp.clip(scores, -clip, clip)


def place_scores(scores, kl, mask, *, kl_coef, clip: float | None = None):
  """Rewards of tokens: the penalty of each, and the answer's score at its last one.

  r_t = -kl_coef kl_t, + clip(score) at the last token (Stiennon et al. 2020, section 3.4;
  Ouyang et al. 2022, equation 2). Their sum over an answer is the reward that `rloo` compares.

  Args:
    scores: float32[N].
    kl: float32[N, M] of `kl.estimate`.
    mask: bool[N, M].
    kl_coef: float or float32[].
    clip: bound of the scores' size, or None.

  Returns:
    float32[N, M].
  """
  last = mask & ~_next(mask)
  scores = clip_scores(scores.astype(jnp.float32), clip)
  rewards = -kl_coef * jnp.where(mask, kl, 0.0)
  return rewards + jnp.where(last, scores[:, None], 0.0)


def gae(rewards, values, mask, *, gamma: float = 1.0, lam: float = 0.95):
  """Generalised advantage estimates and the returns that values learn (Schulman et al. 2016).

  delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} (equations 12 and 16),
  both V and A being 0 after the last token, where the episode ends; returns are A_t + V_t.

  Args:
    rewards: float32[N, M] of `place_scores`.
    values: float32[N, M], the critic's expectation before each token.
    mask: bool[N, M].
    gamma: discount per token.
    lam: 1 for the returns less the values, 0 for one step ahead.

  Returns:
    (float32[N, M] advantages, float32[N, M] returns).
  """
  rewards, values = (jnp.where(mask, x, 0).astype(jnp.float32) for x in (rewards, values))
  deltas = rewards + gamma * _next(values) - values
  carried = jnp.where(_next(mask), gamma * lam, 0.0).astype(jnp.float32)

  def join(later, earlier):
    """Of two runs of tokens: what of an advantage behind them reaches their first, and its own."""
    return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

  # In log2(M) steps rather than M.
  _, advantages = jax.lax.associative_scan(join, (carried, deltas), reverse=True, axis=1)
  advantages = jnp.where(mask, advantages, 0.0)
  return advantages, advantages + values


def whiten(advantages, mask):
  """Advantages of variance 1 over all tokens (unbiased, as TRL's masked_whiten), and of mean 0.

  Args:
    advantages: float32[N, M] of the whole rollout, so that mini-batches share mean and variance.
    mask: bool[N, M].

  Returns:
    float32[N, M].
  """
  advantages = jnp.where(mask, advantages, 0).astype(jnp.float32)
  count = jnp.sum(mask)
  mean = jnp.sum(advantages) / jnp.maximum(count, 1)
  centred = jnp.where(mask, advantages - mean, 0.0)
  variance = jnp.sum(centred**2) / jnp.maximum(count - 1, 1)
  return centred * jax.lax.rsqrt(variance + 1e-8)


def rloo(scores, valid):
  """Each answer's score less the mean of the prompt's other answers (Ahmadian et al. 2024, RLOO).

  Args:
    scores: float32[B, n], rewards of n answers to each prompt, the penalty of KL included.
    valid: bool[B, n], false for what is to be left out.

  Returns:
    float32[B, n]; 0 where an answer has no other beside it.
  """
  centred, count = _centre(scores, valid)
  # r_i - (sum - r_i) / (n - 1), without the difference of large sums.
  return centred * count / jnp.maximum(count - 1, 1)


def grpo(scores, valid, *, scale_by_std: bool = True):
  """Each answer's score relative to its prompt's answers (Shao et al. 2024, section 4.1.2).

  (r - mean) / (std + 1e-4), std unbiased, as TRL's GRPOTrainer.

  Args:
    scores: float32[B, n], without the penalty of KL, which GRPO has in its loss.
    valid: bool[B, n], false for what is to be left out.
    scale_by_std: whether to divide; Liu et al. 2025 (Dr. GRPO) do not.

  Returns:
    float32[B, n]; 0 where an answer has no other beside it.
  """
  centred, count = _centre(scores, valid)
  if not scale_by_std:
    return centred
  variance = jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + 1e-4)


def _centre(scores, valid):
  """(float32[B, n] scores less the mean of their row, 0 where not valid; int32[B, 1] how many)."""
  scores = jnp.where(valid, scores, 0).astype(jnp.float32)
  count = jnp.sum(valid, axis=1, keepdims=True)
  mean = jnp.sum(scores, axis=1, keepdims=True) / jnp.maximum(count, 1)
  return jnp.where(valid & (count > 1), scores - mean, 0.0), count


def _next(x):
  """What stands one place later in [N, M]; 0 or false after the last place."""
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
