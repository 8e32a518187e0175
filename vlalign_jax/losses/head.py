"""Cross-entropies and log-probabilities of tokens from hidden states, without a batch's logits.

In training the gradient is made in the same pass as the loss (the loss is a sum, so each chunk's
gradient is known at once up to one scalar), which saves computing the logits a second time (Hsu et
al. 2024, Liger Kernel, 3.2).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vlalign_jax.losses.chunks import Chunking, map_chunks, token_values
from vlalign_jax.losses.support import Support


def cross_entropy_sum(hidden, kernel, targets, weights, **chunking):
  """Computes a weighted sum of cross-entropies, differentiable in `hidden` and `kernel`.

  Args:
    hidden: float[B, T, D].
    kernel: float[D, V]; used in the dtype of `hidden`.
    targets: int32[B, T].
    weights: float32[B, T]; positions with weight 0 cost nothing.
    **chunking: fields of `chunks.Chunking`.

  Returns:
    float32[], sum over positions of -weight * log softmax(hidden @ kernel)[target].
  """
  return _cross_entropy_sum(hidden, kernel, targets, weights, Chunking(**chunking))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy_sum(hidden, kernel, targets, weights, chunking):
  losses, _ = token_statistics(hidden, kernel, targets, weights, **chunking._asdict())
  return jnp.sum(losses * weights)


def _gradient_scale(dtype) -> float:
  """Returns a factor of the gradients that are made before the loss's own factor is known.

  Without it, those of unlikely tokens would be 0 in float16, whatever the loss is multiplied by.
  """
  return 2.0**12 if dtype == jnp.float16 else 1.0


def _forward(hidden, kernel, targets, weights, chunking):
  weights, scale = weights.value, _gradient_scale(hidden.value.dtype)

  def compute(logits, targets, weights):
    losses = -weights * _log_probabilities(logits, targets)
    return (losses,), _gradient(logits, targets, -weights * scale)

  (losses,), *gradients = map_chunks(
    compute,
    hidden.value,
    kernel.value,
    weights != 0,
    (targets.value, weights),
    chunking=chunking,
    with_kernel=kernel.perturbed,
  )
  return jnp.sum(losses), gradients


def _backward(chunking, gradients, cotangent):
  del chunking
  cotangent = cotangent / _gradient_scale(gradients[0].dtype)
  return *jax.tree.map(lambda x: x * cotangent.astype(x.dtype), gradients), None, None


_cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def token_log_probabilities(
  hidden, kernel, targets, weights, *, support: Support | None = None, **chunking
):
  """Computes the log-probability of each target, differentiable in `hidden` and `kernel`.

  Args:
    hidden, kernel, targets, **chunking: as in `cross_entropy_sum`.
    weights: float32[B, T]; only whether they are 0 matters.
    support: which tokens the softmax leaves out; None: none.

  Returns:
    float32[B, T], log softmax(hidden @ kernel)[target] where the weight is not 0, else 0.
  """

  def value(logits, targets):
    return (_log_probabilities(logits, targets),)

  settings = support, value, _gradient, Chunking(**chunking)
  values: Any = token_values(hidden, kernel, targets, weights, *settings)
  return values[0]


def token_statistics(hidden, kernel, targets, weights, **chunking):
  """Computes the cross-entropy and greedy correctness of each position, without gradient.

  Args:
    hidden, kernel, targets, weights, **chunking: as in `token_log_probabilities`.

  Returns:
    float32[B, T] cross-entropies and bool[B, T] whether the target is the argmax; 0 and False where
    the weight is 0.
  """

  def compute(logits, targets):
    losses = -_log_probabilities(logits, targets)
    return (losses, jnp.argmax(logits, axis=-1) == targets), None

  chunking = Chunking(**chunking)
  return map_chunks(compute, hidden, kernel, weights != 0, (targets,), chunking=chunking)[0]


def is_target(logits, targets):
  """Returns bool[S, C, V], true at the targets int32[S, C]."""
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[:, :, None]


def select_targets(x, targets):
  """Returns the entries [S, C] of x [S, C, V] at the targets int32[S, C]."""
  return jnp.sum(jnp.where(is_target(x, targets), x, 0.0), axis=-1)


def _log_probabilities(logits, targets):
  """Returns float32[S, C], log softmax(logits)[target], of logits [S, C, V]."""
  return select_targets(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def _gradient(logits, targets, cotangents):
  """Returns float32[S, C, V], the gradient of `_log_probabilities` times cotangents [S, C]."""
  probabilities = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1)[:, :, None])
  return (is_target(logits, targets) - probabilities) * cotangents[:, :, None]
