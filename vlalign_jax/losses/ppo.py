"""Proximal policy optimization (Schulman et al. 2017): losses of tokens, and metrics.

Arrays are [N, M], with `mask` bool[N, M] true for an answer's tokens, see `losses.advantages`.
"""

import jax.numpy as jnp

from vlalign_jax.errors import InputError

LEVELS = ("token", "answer", "sequence")


def check_level(level: str) -> None:
  """Raises InputError for a level that is not one of LEVELS."""
  if level not in LEVELS:
    raise InputError(f"ppo.loss_level={level!r}: choose one of {', '.join(LEVELS)}")


def policy_loss(logps, old_logps, advantages, mask, *, clip: float = 0.2, level: str = "token"):
  """Computes the clipped surrogate loss (Schulman et al. 2017, equation 7).

  max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = exp(logps - old_logps).

  Args:
    logps: float32[N, M], log-probabilities of the tokens; gradients flow into these.
    old_logps: float32[N, M], the same when they were sampled.
    advantages: float32[N, M], or float32[N, 1] where an answer's tokens share one.
    mask: bool[N, M].
    clip: how far rho may move from 1; a larger gain does not count.
    level: what is averaged. token: all tokens. answer: over answers, the mean of each answer's
      tokens (Shao et al. 2024, equation 3). sequence: answers, with rho the product over an
      answer's tokens (Ahmadian et al. 2024, where an answer is one action; TRL's RLOOTrainer) and
      the advantage of its first token.

  Returns:
    ((float32[] sum, float32[] count), dict of such pairs): `loss/policy_avg` (the loss),
    `policy/approxkl_avg` (mean of (log rho)^2 / 2), `policy/clipfrac_avg` (share where the clipped
    term is greater), `val/ratio` (mean of rho) and `val/ratio_var` (mean of (rho - 1)^2, which
    `summary` turns into the variance).
  """
  check_level(level)
  logps, old_logps = _clean(mask, logps, old_logps)
  log_ratio = logps - old_logps
  advantages = jnp.where(mask, advantages, 0).astype(jnp.float32)
  if level == "sequence":
    first = jnp.argmax(mask, axis=1, keepdims=True)
    advantages = jnp.take_along_axis(advantages, first, axis=1)
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
    mask = jnp.any(mask, axis=1, keepdims=True)
  ratio = jnp.exp(log_ratio)
  unclipped = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
  loss = average(jnp.maximum(unclipped, clipped), mask, level=level)
  return loss, {
    "loss/policy_avg": loss,
    "policy/approxkl_avg": average(log_ratio**2 / 2, mask),
    "policy/clipfrac_avg": average(clipped > unclipped, mask),
    "val/ratio": average(ratio, mask),
    "val/ratio_var": average((ratio - 1) ** 2, mask),
  }


def value_loss(values, old_values, returns, mask, *, clip: float = 0.2):
  """Computes half the critic's squared error, clipped like the policy (OpenAI's baselines, TRL).

  max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

  Args:
    values: float32[N, M], the critic's; gradients flow into these.
    old_values: float32[N, M], the same during the rollout.
    returns: float32[N, M] of `advantages.gae`.
    mask: bool[N, M].
    clip: how far a value may move per rollout, in units of the rewards.

  Returns:
    ((float32[] sum, float32[] count) over tokens, dict of such pairs): `loss/value_avg` (the loss)
    and `val/clipfrac_avg` (share where the clipped error is greater).
  """
  values, old_values, returns = _clean(mask, values, old_values, returns)
  unclipped = (values - returns) ** 2
  clipped = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
  loss = average(jnp.maximum(unclipped, clipped) / 2, mask)
  return loss, {"loss/value_avg": loss, "val/clipfrac_avg": average(clipped > unclipped, mask)}


def average(values, mask, *, level: str = "token"):
  """Returns (float32[] sum, float32[] count), whose quotient is the mean of values.

  Also used for the entropy bonus (`policy/entropy_avg`) and GRPO's KL penalty.

  Args:
    values: [N, M].
    mask: bool[N, M].
    level: token: the mean over tokens; else over answers, of the means over their tokens.
  """
  check_level(level)
  values = jnp.where(mask, values, 0).astype(jnp.float32)
  if level == "token":
    return jnp.sum(values), jnp.sum(mask).astype(jnp.float32)
  tokens = jnp.sum(mask, axis=1)
  means = jnp.sum(values, axis=1) / jnp.maximum(tokens, 1)
  return jnp.sum(means), jnp.sum(tokens > 0).astype(jnp.float32)


def objective(scores, shaped, kl, logps, mask, ended, *, kl_coef, first_coefficient):
  """Computes a rollout's metrics, under the names of TRL's PPOTrainer.

  Args:
    scores: float32[N], from the reward model or function.
    shaped: float32[N], as used for advantages: normalized, minus the penalty of a missing end
      token, and clipped.
    kl: float32[N, M] of `kl.estimate`.
    logps: float32[N, M], log-probabilities of the sampled tokens.
    mask: bool[N, M].
    ended: bool[N], whether the answer has its end token.
    kl_coef: float or float32[], during this rollout.
    first_coefficient: the config's, which is constant even if kl_coef adapts.

  Returns:
    Dict of (float32[] sum over answers, float32[] answers): `objective/kl`, `objective/entropy`
    (both summed over an answer's tokens), `objective/scores`, `objective/shaped_scores`,
    `objective/non_score_reward` (-kl_coef x KL) and `objective/rlhf_reward` (the score minus
    first_coefficient x KL, comparable between steps); and float32[] `val/num_eos_tokens`.
    Evaluation reports the same quantities under the same names.
  """
  kl, logps = _clean(mask, kl, logps)
  real = jnp.any(mask, axis=1)
  scores, shaped = (jnp.where(real, x, 0).astype(jnp.float32) for x in (scores, shaped))
  kl_sums = jnp.sum(kl, axis=1)
  count = jnp.sum(real).astype(jnp.float32)
  return {
    "objective/kl": (jnp.sum(kl), count),
    "objective/entropy": (-jnp.sum(logps), count),
    "objective/scores": (jnp.sum(scores), count),
    "objective/shaped_scores": (jnp.sum(shaped), count),
    "objective/non_score_reward": (jnp.sum(-kl_coef * kl_sums), count),
    "objective/rlhf_reward": (jnp.sum(scores - first_coefficient * kl_sums), count),
    "val/num_eos_tokens": jnp.sum(real & ended).astype(jnp.float32),
  }


def summary(quotients: dict) -> dict:
  """Turns `val/ratio_var` of `sums.quotients` into the variance of the ratio; keeps the others.

  The variance is over all tokens or answers (TRL's is between the means of micro-batches). The
  squares are around 1, where ratios are, so that float32 has digits for them.
  """
  if "val/ratio_var" not in quotients:
    return quotients
  variance = quotients["val/ratio_var"] - (quotients["val/ratio"] - 1) ** 2
  return quotients | {"val/ratio_var": variance}


def _clean(mask, *arrays):
  """Returns float32[N, M] each, 0 where there is no token."""
  return tuple(jnp.where(mask, x, 0).astype(jnp.float32) for x in arrays)
