"""Ranked answers, best first: their ordered pairs, and the likelihood of a ranking."""

import jax
import jax.numpy as jnp

# Instead of -inf, whose gradients are nan; its exp is 0 as well.
NEVER = -1e30


def ordered_pairs(valid):
  """Returns which answer is ranked above which.

  Args:
    valid: bool[N, K], whether there is an answer of rank k; rank 0 is the best.

  Returns:
    bool[N, K, K], [n, i, j] whether answers i and j exist and i is better.
  """
  K = valid.shape[1]
  better = jnp.triu(jnp.ones((K, K), bool), k=1)
  return better & valid[:, :, None] & valid[:, None, :]


def is_ranked(valid):
  """Returns bool[N], whether an example has two answers to compare; valid is bool[N, K]."""
  return jnp.sum(valid, axis=1) > 1


def differences(scores):
  """Returns float[N, K, K], [n, i, j] the score of answer i minus that of j; scores: [N, K]."""
  return scores[:, :, None] - scores[:, None, :]


def plackett_luce(scores, above, margin=None):
  """Computes the negative log-likelihood of each example's ranking (Plackett 1975; Luce 1959).

  The likelihood is the product over ranks i of exp(s_i) / sum over j of exp(s_j), for j = i and all
  ranked below. So the loss is the sum over i of log(1 + sum over j below i of exp(s_j - s_i)). Two
  answers make it Bradley-Terry, -log sigmoid(s_0 - s_1).

  Args:
    scores: float32[N, K]; scores of answers without a pair are ignored.
    above: bool[N, K, K] of `ordered_pairs`; swap the last two axes for the reversed ranking.
    margin: float32[N] or None, subtracted from each difference s_i - s_j (Touvron et al. 2023,
      Llama 2, equation 2).

  Returns:
    float32[N], 0 where there is nothing to compare.
  """
  gaps = -differences(scores)  # [n, i, j] s_j - s_i
  if margin is not None:
    gaps += margin[:, None, None]
  gaps = jnp.where(above, gaps, NEVER)
  return jnp.sum(jax.nn.softplus(jax.nn.logsumexp(gaps, axis=2)), axis=1)
