"""Direct preference optimization (Rafailov et al. 2023): losses and metrics."""

import jax.numpy as jnp

from vlalign_jax.errors import InputError
from vlalign_jax.losses import ranking

KINDS = ("sigmoid", "hinge", "ipo", "robust")


def check_settings(kind: str, beta: float, label_smoothing: float, sft_weight: float) -> None:
  """Raises InputError for values of the config's `dpo` group that are out of range."""
  if kind not in KINDS:
    raise InputError(f"dpo.loss={kind!r}: choose one of {', '.join(KINDS)}")
  if not beta > 0:
    raise InputError(f"dpo.beta={beta}: must be above 0; 0.1 is usual")
  if not 0 <= label_smoothing < 0.5:
    raise InputError(
      f"dpo.label_smoothing={label_smoothing}: must be at least 0 and below 0.5; it is the share "
      "of rankings assumed to be reversed"
    )
  if label_smoothing and kind not in ("sigmoid", "robust"):
    raise InputError(
      f"dpo.label_smoothing={label_smoothing}: dpo.loss={kind!r} does not use it; set it to 0, or "
      "choose dpo.loss=sigmoid or robust"
    )
  if sft_weight < 0:
    raise InputError(f"dpo.sft_weight={sft_weight}: must be at least 0")


def loss(
  logps,
  reference,
  lengths,
  valid,
  *,
  kind: str = "sigmoid",
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  sft_weight: float = 0.0,
  chosen_length=None,
):
  """Returns the sum over examples of a DPO loss, and the number of examples.

  With r_k = logps - reference of answer k, d = r_0 - r_1 and e = label_smoothing, for two answers:
    sigmoid: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) (Rafailov et al. 2023, equation
      7; Mitchell 2023, cDPO, equation 3).
    robust: (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e) (Chowdhury et al.
      2024, "Provably robust DPO").
    hinge: max(0, 1 - beta d) (Zhao et al. 2023, SLiC-HF; with these ratios Liu et al. 2024, RSO).
    ipo: (r_0 / length_0 - r_1 / length_1 - 1 / (2 beta))^2 (Azar et al. 2023, equation 17, per
      token as in TRL).
  With more than two answers, the first two use the Plackett-Luce likelihood of beta r instead of
  the sigmoid (Rafailov et al. 2023, equation 20), and that of the reversed ranking in the terms
  with a factor e; the others take the mean over the example's ordered pairs.

  Args:
    logps: float32[N, K], log-probability of each answer (sum over its tokens), best first.
    reference: float32[N, K], the same by the reference model.
    lengths: int32 or float32[N, K], tokens of each answer.
    valid: bool[N, K], false where an example has fewer answers; values there are ignored.
    kind: one of KINDS.
    beta: strength of the pull toward the reference; for ipo its tau.
    label_smoothing: share of rankings assumed to be reversed; for sigmoid and robust.
    sft_weight: weight of the mean cross-entropy per token of the best answers, which is added to
      the loss (Pang et al. 2024; `sft` among TRL's loss types).
    chosen_length: float32[], mean number of tokens of the best answers in the batch that the caller
      averages the loss over; None: this batch, which is then not a micro-batch of a larger one.

  Returns:
    (float32[] sum, float32[] number of examples with at least two answers).
  """
  check_settings(kind, beta, label_smoothing, sft_weight)
  logps, reference, lengths = _clean(logps, reference, lengths, valid)
  above = ranking.ordered_pairs(valid)
  ratios = logps - reference
  if kind in ("sigmoid", "robust"):
    losses = ranking.plackett_luce(beta * ratios, above)
    if label_smoothing:
      reversed_losses = ranking.plackett_luce(beta * ratios, jnp.swapaxes(above, 1, 2))
      if kind == "sigmoid":
        losses = (1 - label_smoothing) * losses + label_smoothing * reversed_losses
      else:
        losses = (1 - label_smoothing) * losses - label_smoothing * reversed_losses
        losses /= 1 - 2 * label_smoothing
  elif kind == "hinge":
    losses = _mean_over_pairs(jnp.maximum(0.0, 1 - beta * ranking.differences(ratios)), above)
  else:
    per_token = ranking.differences(ratios / lengths)
    losses = _mean_over_pairs((per_token - 1 / (2 * beta)) ** 2, above)
  ranked = ranking.is_ranked(valid)
  total, count = jnp.sum(losses), jnp.sum(ranked).astype(jnp.float32)
  if sft_weight:
    nll, tokens = _cross_entropy_of_best(logps, lengths, ranked)
    # The caller divides by the number of examples, which makes this nll / tokens.
    if chosen_length is None:
      chosen_length = tokens / jnp.maximum(count, 1.0)
    total += sft_weight * nll / jnp.maximum(chosen_length, 1.0)
  return total, count


def metrics(logps, reference, lengths, valid, *, beta: float = 0.1):
  """Computes a batch's metrics, under the names of TRL's DPOTrainer.

  The reward of an answer is beta (logps - reference). With more than two answers, `chosen` is the
  best one, `rejected` the mean of the others and `margins` the difference of the two; accuracies
  are over all ordered pairs.

  Args:
    logps, reference, lengths, valid, beta: as in `loss`.

  Returns:
    Dict of (float32[] sum, float32[] count): `rewards/chosen`, `rewards/rejected`,
    `rewards/margins`, `rewards/accuracies` (pairs whose better answer has the higher reward),
    `logps/chosen`, `logps/rejected`, `logps/accuracies` and `logps/accuracies_per_token` (pairs
    whose better answer has the higher log-probability by the policy, in sum or per token),
    `logps/reference_accuracies` (the same by the reference, in sum), `nll_loss` (mean cross-entropy
    per token of the best answers).
  """
  logps, reference, lengths = _clean(logps, reference, lengths, valid)
  above, ranked = ranking.ordered_pairs(valid), ranking.is_ranked(valid)
  rewards = beta * (logps - reference)
  examples = jnp.sum(ranked).astype(jnp.float32)
  others = jnp.maximum(jnp.sum(valid, axis=1) - 1, 1)

  def sums(x):
    """Sums over examples the best answer's value, and the mean of the other answers' values."""
    return jnp.sum(x[:, 0] * ranked), jnp.sum(jnp.sum(x[:, 1:], axis=1) / others)

  def accuracy(x):
    correct = above & (ranking.differences(x) > 0)
    return jnp.sum(correct).astype(jnp.float32), jnp.sum(above).astype(jnp.float32)

  chosen, rejected = sums(rewards)
  chosen_logps, rejected_logps = sums(logps)
  return {
    "rewards/chosen": (chosen, examples),
    "rewards/rejected": (rejected, examples),
    "rewards/margins": (chosen - rejected, examples),
    "rewards/accuracies": accuracy(rewards),
    "logps/chosen": (chosen_logps, examples),
    "logps/rejected": (rejected_logps, examples),
    "logps/accuracies": accuracy(logps),
    "logps/accuracies_per_token": accuracy(logps / lengths),
    "logps/reference_accuracies": accuracy(reference),
    "nll_loss": _cross_entropy_of_best(logps, lengths, ranked),
  }


def _clean(logps, reference, lengths, valid):
  """Returns float32[N, K] each; where there is no answer they are 0, 0 and 1."""
  logps, reference = (jnp.where(valid, x, 0).astype(jnp.float32) for x in (logps, reference))
  return logps, reference, jnp.where(valid, jnp.maximum(lengths, 1), 1).astype(jnp.float32)


def _mean_over_pairs(values, above):
  """Returns the mean [N] of values float32[N, K, K] over pairs; 0 without a pair."""
  total = jnp.sum(jnp.where(above, values, 0.0), axis=(1, 2))
  return total / jnp.maximum(jnp.sum(above, axis=(1, 2)), 1)


def _cross_entropy_of_best(logps, lengths, ranked):
  """Returns (sum over the best answers' tokens, number of these tokens)."""
  return -jnp.sum(logps[:, 0] * ranked), jnp.sum(lengths[:, 0] * ranked)
