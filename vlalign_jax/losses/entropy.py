"""Log-probabilities of tokens together with the entropy of each prediction, as `losses.head`."""

import functools

import jax
import jax.numpy as jnp

from vlalign_jax.losses import head
from vlalign_jax.losses.support import Support, restrict


def token_log_probabilities_and_entropies(
  hidden,
  kernel,
  targets,
  weights,
  *,
  shards: int = 1,
  chunk: int = 128,
  place=head.as_it_is,
  scatter=head.as_it_is,
  support: Support | None = None,
):
  """As `head.token_log_probabilities`, and the entropy of what was predicted; both differentiable.

  Returns:
    (float32[B, T] log-probabilities, float32[B, T] entropies in nats), 0 where the weight is 0;
    both of the distribution over what `support` leaves.
  """
  settings = shards, chunk, place, scatter
  return _log_probabilities_and_entropies(hidden, kernel, targets, weights, support, *settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _log_probabilities_and_entropies(
  hidden, kernel, targets, weights, support, shards, chunk, place, scatter
):
  del scatter
  shape = targets.shape
  kernel = place(kernel.astype(hidden.dtype))
  hidden, targets, weights, order, chunks = head.compact(hidden, targets, weights, shards, chunk)
  support = head.compact_support(support, order, chunk)

  def body(i, carry):
    start = i * chunk
    h, t, w = (head.part_of(x, start, chunk) for x in (hidden, targets, weights))
    logs = _logs(h, kernel, place, head.support_part(support, start, chunk))
    found = jnp.sum(jnp.where(head.is_target_of(logs, t), logs, 0.0), -1), _entropy(logs)
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(x, jnp.where(w != 0, new, 0.0), start, axis=1)
      for x, new in zip(carry, found, strict=True)
    )

  none = jnp.zeros(weights.shape, jnp.float32)
  found = jax.lax.fori_loop(0, chunks, body, (none, none))
  back = jnp.argsort(order, axis=1)
  return tuple(head.gather(x, back).reshape(shape) for x in found)


def _logs(hidden, kernel, place, support: Support | None):
  """float32[S, C, V], log-probabilities of a chunk of positions."""
  return jax.nn.log_softmax(restrict(place(head.logits_of(hidden, kernel)), support))


def _entropy(logs):
  """float[S, C] of log-probabilities [S, C, V]."""
  return -jnp.sum(jnp.exp(logs) * logs, axis=-1)


def _array(cotangent):
  """Of what no loss depends on, the cotangent is only said to be zero."""
  if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def _entropies_forward(hidden, kernel, targets, weights, support, *settings):
  support = jax.tree.map(lambda x: x.value, support, is_leaf=head.is_primal)
  inputs = (hidden.value, kernel.value, targets.value, weights.value, support)
  with_kernel = () if kernel.perturbed else None
  return _log_probabilities_and_entropies(*inputs, *settings), (inputs, with_kernel)


def _entropies_backward(shards, chunk, place, scatter, residuals, cotangents):
  (hidden, kernel, targets, weights, support), with_kernel = residuals
  shape, kernel_dtype = hidden.shape, kernel.dtype
  kernel = place(kernel.astype(hidden.dtype))
  cotangents = [_array(x).reshape(shards, -1) for x in cotangents]
  hidden, targets, weights, order, chunks = head.compact(hidden, targets, weights, shards, chunk)
  support = head.compact_support(support, order, chunk)
  padding = ((0, 0), (0, hidden.shape[1] - order.shape[1]))
  cotangents = [jnp.pad(head.gather(x, order), padding) for x in cotangents]

  def body(i, carry):
    hidden_grad, kernel_grad = carry
    start = i * chunk
    h, t, w, *of = (head.part_of(x, start, chunk) for x in (hidden, targets, weights, *cotangents))
    by_log, by_entropy = (jnp.where(w != 0, x, 0.0)[:, :, None] for x in of)
    logs = _logs(h, kernel, place, head.support_part(support, start, chunk))
    probabilities = jnp.exp(logs)
    # The entropy's derivative by a logit is -p (log p + H).
    grad = by_log * (head.is_target_of(logs, t) - probabilities)
    grad -= by_entropy * probabilities * (logs + _entropy(logs)[:, :, None])
    grad = grad.astype(h.dtype)
    h_grad = jnp.einsum("SCV,DV->SCD", grad, kernel)
    hidden_grad = jax.lax.dynamic_update_slice_in_dim(hidden_grad, h_grad, start, axis=1)
    if with_kernel is not None:
      kernel_grad += jnp.einsum("SCD,SCV->SDV", h, grad, preferred_element_type=jnp.float32)
    return hidden_grad, kernel_grad

  kernel_grad = jnp.zeros((), jnp.float32)
  if with_kernel is not None:
    kernel_grad = place(jnp.zeros((shards, *kernel.shape), jnp.float32))
  carry = jax.lax.fori_loop(0, chunks, body, (jnp.zeros_like(hidden), kernel_grad))
  hidden_grad = head.gather(carry[0], jnp.argsort(order, axis=1)).reshape(shape)
  if with_kernel is None:
    return hidden_grad, None, None, None, None
  kernel_grad = scatter(jnp.sum(carry[1], axis=0)).astype(kernel_dtype)
  return (*jax.lax.optimization_barrier((hidden_grad, kernel_grad)), None, None, None)


_log_probabilities_and_entropies.defvjp(
  _entropies_forward, _entropies_backward, symbolic_zeros=True
)
