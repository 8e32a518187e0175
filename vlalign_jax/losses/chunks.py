"""The loop over chunks of positions in which the output head's logits exist.

Only positions that count reach the vocabulary, so that nothing has the size [B, T, V].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlalign_jax.losses.support import Support, restrict


class Chunking(NamedTuple):
  """How positions are cut into chunks, and where arrays over the vocabulary lie.

  Attributes:
    shards: over how many devices B is split; B rows fall into this many contiguous blocks.
    chunk: positions per shard whose logits exist at a time.
    place: array -> array, places the kernel [D, V] and arrays made from it [shards, .., V] over
      devices; a kernel that ZeRO splits is gathered before the loop.
    scatter: array -> array, places the kernel's gradient [D, V].
  """

  shards: int = 1
  chunk: int = 128
  place: Callable = lambda x: x
  scatter: Callable = lambda x: x


def map_chunks(
  compute,
  hidden,
  kernel,
  mask,
  arrays: tuple,
  *,
  chunking: Chunking,
  support: Support | None = None,
  with_kernel: bool = False,
):
  """Computes values of positions from their logits, and gradients of a sum of such values.

  Args:
    compute: `(logits float32[S, C, V], *arrays [S, C]) -> (values, gradient)` for C positions of
      each of S shards: a tuple of [S, C], and the sum's gradient [S, C, V] by the logits or None.
    hidden: float[B, T, D].
    kernel: float[D, V]; used in the dtype of `hidden`.
    mask: bool[B, T], the positions to compute.
    arrays: [B, T] each. Those that gradients are multiplied by must be 0 outside the mask.
    chunking: how to go through them.
    support: which tokens the softmax leaves out; None: none.
    with_kernel: whether to compute the gradient by the kernel.

  Returns:
    Tuple of [B, T] values, 0 outside the mask; gradients [B, T, D] by `hidden` and [D, V] by
    `kernel`, or None.
  """
  shards, chunk, place, scatter = chunking
  (B, T, _), kernel_dtype = hidden.shape, kernel.dtype
  kernel = place(kernel.astype(hidden.dtype))
  order = jnp.argsort(~mask.reshape(shards, -1), axis=1, stable=True)
  padding = -order.shape[1] % chunk

  def permute(x, order):
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

  def compact(x):
    """Reshapes [B, T, ...] to [S, N, ...], masked positions first; N is a multiple of `chunk`."""
    x = permute(x.reshape(shards, -1, *x.shape[2:]), order)
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))

  early = None if support is None else support.early
  compacted = jax.tree.map(compact, (hidden, mask, early, arrays))
  count = jnp.max(jnp.sum(mask.reshape(shards, -1), axis=1))

  def compute_chunk(start):
    """Returns values [S, C] and gradients [S, C, D] of a chunk, and the kernel's [S, D, V]."""
    h, counts, early, parts = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1), compacted
    )
    logits = place(jnp.einsum("SCD,DV->SCV", h, kernel, preferred_element_type=jnp.float32))
    if support is not None:
      logits = restrict(logits, support._replace(early=early))
    values, grad = compute(logits, *parts)
    values = tuple(jnp.where(counts, x, jnp.zeros_like(x)) for x in values)
    if grad is None:
      return (values, None), None
    grad = grad.astype(h.dtype)
    by_position = values, jnp.einsum("SCV,DV->SCD", grad, kernel)
    if not with_kernel:
      return by_position, None
    # A sum per shard: adding over shards here would mean a reduction across devices per chunk.
    return by_position, jnp.einsum("SCD,SCV->SDV", h, grad, preferred_element_type=jnp.float32)

  def body(i, carry):
    by_position, kernel_grad = carry
    chunk_by_position, chunk_kernel_grad = compute_chunk(i * chunk)
    by_position = jax.tree.map(
      lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, i * chunk, axis=1),
      by_position,
      chunk_by_position,
    )
    return by_position, kernel_grad + chunk_kernel_grad if with_kernel else None

  shapes, _ = jax.eval_shape(compute_chunk, 0)
  N = order.shape[1] + padding
  start = jax.tree.map(lambda x: jnp.zeros((shards, N, *x.shape[2:]), x.dtype), shapes)
  kernel_grad = place(jnp.zeros((shards, *kernel.shape), jnp.float32)) if with_kernel else None
  by_position, kernel_grad = jax.lax.fori_loop(
    0, (count + chunk - 1) // chunk, body, (start, kernel_grad)
  )
  back = jnp.argsort(order, axis=1)
  values, hidden_grad = jax.tree.map(
    lambda x: permute(x, back).reshape(B, T, *x.shape[2:]), by_position
  )
  if with_kernel:
    kernel_grad = scatter(jnp.sum(kernel_grad, axis=0)).astype(kernel_dtype)
    # Otherwise the sum may wait, with its operand in memory, until all layers have gradients.
    hidden_grad, kernel_grad = jax.lax.optimization_barrier((hidden_grad, kernel_grad))
  return values, hidden_grad, kernel_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def token_values(
  hidden, kernel, targets, weights, support, value, gradient, chunking: Chunking
) -> Any:
  """Computes values of positions from their logits, differentiable in `hidden` and `kernel`.

  The backward pass computes logits again, only for positions with a non-zero cotangent: the forward
  pass does not know what a loss makes of the values.

  Args:
    hidden, kernel, support, chunking: as in `map_chunks`.
    targets: int32[B, T].
    weights: float32[B, T]; only whether they are 0 matters.
    value: `(logits [S, C, V], targets [S, C]) -> values`, a tuple of float32[S, C].
    gradient: `(logits, targets, *cotangents [S, C]) -> float32[S, C, V]`, by the logits.

  Returns:
    Tuple of float32[B, T] values, 0 where the weight is 0.
  """

  def compute(logits, targets):
    return value(logits, targets), None

  values, _, _ = map_chunks(
    compute, hidden, kernel, weights != 0, (targets,), chunking=chunking, support=support
  )
  return values


def _forward(hidden, kernel, targets, weights, support, value, gradient, chunking):
  is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
  inputs = jax.tree.map(
    lambda x: x.value, (hidden, kernel, targets, weights, support), is_leaf=is_primal
  )
  # Residuals must be arrays, so this flag is the structure of a tree: () or None.
  with_kernel = () if kernel.perturbed else None
  return token_values(*inputs, value, gradient, chunking), (inputs, with_kernel)


def _backward(value, gradient, chunking, residuals, cotangents):
  del value
  (hidden, kernel, targets, weights, support), with_kernel = residuals
  # A value that no loss depends on has a symbolic zero as its cotangent.
  is_zero: Any = jax.custom_derivatives.SymbolicZero
  cotangents = [
    jnp.zeros(x.shape, x.dtype) if isinstance(x, is_zero) else jnp.where(weights != 0, x, 0)
    for x in cotangents
  ]
  _, hidden_grad, kernel_grad = map_chunks(
    lambda *args: ((), gradient(*args)),
    hidden,
    kernel,
    functools.reduce(jnp.logical_or, (x != 0 for x in cotangents)),
    (targets, *cotangents),
    chunking=chunking,
    support=support,
    with_kernel=with_kernel is not None,
  )
  return hidden_grad, kernel_grad, None, None, None


token_values.defvjp(_forward, _backward, symbolic_zeros=True)
