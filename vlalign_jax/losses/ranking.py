"""Ranked answers, best first: their ordered pairs, and the likelihood of a ranking."""

import jax
import jax.numpy as jnp

# Instead of -inf, whose gradients are nan: exp of it is 0 beside any score.
NEVER = -1e30


def ordered_pairs(valid):
  """Which answer was ranked above which.

  Args:
    valid: bool[N, K], whether there is an answer of rank k; rank 0 is the best.

  Returns:
    bool[N, K, K], [n, i, j] whether answers i and j exist and i is the better one.
  """
  K = valid.shape[1]
  better = jnp.triu(jnp.ones((K, K), bool), k=1)
  return better & valid[:, :, None] & valid[:, None, :]


def is_ranked(valid):
  """bool[N], whether an example has answers to compare, given valid bool[N, K]."""
  return jnp.sum(valid, axis=1) > 1


def differences(scores):
  """float[N, K, K], [n, i, j] the score of answer i less that of j, given scores float[N, K]."""
  return scores[:, :, None] - scores[:, None, :]


def plackett_luce(scores, above, margin=None):
  """Negative log-likelihood of each example's ranking (Plackett 1975; Luce 1959).

  -log of the product over ranks i of exp(s_i) / sum over j of exp(s_j), j being i and all ranked
  below it, as sum over i of log(1 + sum over j below i of exp(s_j - s_i)). For two answers it is
  Bradley-Terry, -log sigmoid(s_0 - s_1).

  Args:
    scores: float32[N, K]; those of answers that no pair has do not matter.
    above: bool[N, K, K] of `ordered_pairs`; with its last two axes swapped, the likelihood is that
      of the reversed ranking.
    margin: float32[N] or None, by how much more an answer must score than one ranked below it to
      be as likely (Touvron et al. 2023, Llama 2, equation 2).

  Returns:
    float32[N], 0 where there is nothing to compare.
  """
  behind = -differences(scores)  # [n, i, j] s_j - s_i
  if margin is not None:
    behind += margin[:, None, None]
  behind = jnp.where(above, behind, NEVER)
  return jnp.sum(jax.nn.softplus(jax.nn.logsumexp(behind, axis=2)), axis=1)
