"""Log-probabilities of tokens together with the entropy of each prediction."""

import jax
import jax.numpy as jnp

from vlalign_jax.losses import head
from vlalign_jax.losses.chunks import Chunking, token_values
from vlalign_jax.losses.support import Support


def token_log_probabilities_and_entropies(
  hidden, kernel, targets, weights, *, support: Support | None = None, **chunking
) -> tuple[jax.Array, jax.Array]:
  """Computes `head.token_log_probabilities` and the predictions' entropies, both differentiable.

  Returns:
    (float32[B, T] log-probabilities, float32[B, T] entropies in nats), 0 where the weight is 0;
    both of the distribution over the tokens that `support` leaves.
  """

  settings = support, _values, _gradient, Chunking(**chunking)
  return token_values(hidden, kernel, targets, weights, *settings)


def _values(logits, targets):
  """Returns float32[S, C] log-probabilities and entropies, of logits [S, C, V]."""
  logps = jax.nn.log_softmax(logits)
  return head.select_targets(logps, targets), _entropy(logps)


def _gradient(logits, targets, logp_cotangents, entropy_cotangents):
  """Returns float32[S, C, V], the gradient of both values, times their cotangents [S, C]."""
  logps = jax.nn.log_softmax(logits)
  probabilities = jnp.exp(logps)
  grad = logp_cotangents[:, :, None] * (head.is_target(logps, targets) - probabilities)
  # The entropy's derivative by a logit is -p (log p + H).
  by_entropy = probabilities * (logps + _entropy(logps)[:, :, None])
  return grad - entropy_cotangents[:, :, None] * by_entropy


def _entropy(logps):
  """Returns float32[S, C], of log-probabilities [S, C, V]."""
  return -jnp.sum(jnp.exp(logps) * logps, axis=-1)
