"""The advantages of a rollout."""

import jax.numpy as jnp

from vlalign_jax.losses import advantages as estimators
from vlalign_jax.losses import kl as penalties
from vlalign_jax.losses import ppo as losses


def compute_advantages(
  scores, normalized, logps, reference, drawn, values, lengths, ended, kl_coef, *, settings
) -> tuple[dict, dict]:
  """Computes the advantages of the tokens of a rollout, and its metrics.

  An answer whose score is not finite is left out, as if it had no token.

  Args:
    scores: float32[B, N], raw, for the metrics.
    normalized: float32[B, N], scores relative to `ppo.score_queue`, or raw; they make the rewards.
    logps, reference: float32[B, N, M] log-probabilities of the tokens, when they were sampled and
      by the reference.
    drawn: float32[B, N, M], the same under the distribution that top_k and top_p leave, from which
      the tokens were drawn.
    values: float32[B, N, M] of the critic; None: there is none.
    lengths: int32[B, N], tokens of each answer; 0 where there is none.
    ended: bool[B, N], whether it has its end token.
    kl_coef: float32[].
    settings: the config's `ppo` group.

  Returns:
    (fields of `steps.ppo`, values as in `losses.sums`).
  """
  B, N, M = logps.shape
  valid = (lengths > 0) & jnp.isfinite(normalized)
  mask = (jnp.arange(M) < lengths[:, :, None]) & valid[:, :, None]
  flat = mask.reshape(-1, M)
  logps, reference, drawn = (jnp.where(mask, x, 0.0) for x in (logps, reference, drawn))
  kl = penalties.estimate(logps, reference, settings.kl_estimator).reshape(-1, M)
  placed = estimators.penalize_missing_eos(normalized, ended, settings.missing_eos_penalty)
  placed = jnp.where(valid, placed, 0.0).reshape(-1)
  clip = settings.score_clip or None
  fields = {
    "old_log_probabilities": logps,
    "reference_log_probabilities": reference,
    "mask": mask,
  }
  options = {"kl_coef": kl_coef, "clip": clip}
  reported = losses.objective(
    scores.reshape(-1),
    estimators.clip_scores(placed, clip),
    kl,
    logps.reshape(-1, M),
    flat,
    ended.reshape(-1),
    kl_coef=kl_coef,
    first_coefficient=settings.kl_coef,
  )
  rewards = estimators.place_scores(placed, kl, flat, **options)
  if settings.estimator == "gae":
    values = jnp.where(mask, values, 0.0)
    advantages, returns = estimators.gae(
      rewards, values.reshape(-1, M), flat, gamma=settings.gamma, lam=settings.lam
    )
    if settings.whiten_advantages:
      advantages = estimators.whiten(advantages, flat)
    fields |= {"old_values": values, "returns": returns.reshape(B, N, M)}
  elif settings.estimator == "rloo":
    advantages = estimators.rloo(jnp.sum(rewards, axis=1).reshape(B, N), valid)
  else:
    grouped = estimators.clip_scores(placed, clip).reshape(B, N)
    advantages = estimators.grpo(grouped, valid, scale_by_std=settings.scale_by_std)
  advantages = jnp.broadcast_to(advantages.reshape(B, N, -1), (B, N, M))
  count = jnp.sum(valid).astype(jnp.float32)
  tokens = jnp.sum(mask).astype(jnp.float32)
  reported |= {
    "val/answer_tokens": (tokens, count),
    # The ratio of the two is the probability that was kept: no further sum over the vocabulary.
    "policy/cut_probability": (jnp.sum(jnp.maximum(-jnp.expm1(logps - drawn), 0.0)), tokens),
    "val/bad_scores": jnp.sum((lengths > 0) & ~jnp.isfinite(scores)).astype(jnp.float32),
  }
  return fields | {"advantages": jnp.where(mask, advantages, 0.0)}, reported
