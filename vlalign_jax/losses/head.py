"""Next-token statistics from hidden states, without ever holding logits for a whole batch.

Only positions with non-zero weight reach the vocabulary, a chunk of them at a time. In training the
gradient is made in the same pass (the loss is a sum, so each chunk's gradient is known at once up
to one scalar), which saves computing the logits a second time (Hsu et al. 2024, Liger Kernel, 3.2).
"""

import functools

import jax
import jax.numpy as jnp

from vlalign_jax.losses.support import Support, restrict


def gather(x, order):
  """[S, N, ...] in the order int32[S, M] of its second axis."""
  return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def compact(hidden, targets, weights, shards: int, chunk: int):
  """Per shard, brings positions with weight to the front, in order.

  Returns:
    hidden [S, N, D], targets and weights [S, N], the order int32[S, N] that was used, and the
    number of chunks that hold anything, int32[]. N is a multiple of `chunk`.
  """
  S, D = shards, hidden.shape[-1]
  hidden, targets, weights = (
    hidden.reshape(S, -1, D),
    targets.reshape(S, -1),
    weights.reshape(S, -1),
  )
  order = jnp.argsort(weights == 0, axis=1, stable=True)
  padding = -order.shape[1] % chunk
  hidden, targets, weights = (gather(x, order) for x in (hidden, targets, weights))
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
  targets, weights = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, weights))
  counts = jnp.max(jnp.sum(weights != 0, axis=1))
  return hidden, targets, weights, order, (counts + chunk - 1) // chunk


def compact_support(support: Support | None, order, chunk: int) -> Support | None:
  """The support of what `compact` has brought into `order` int32[S, N], padded as it is."""
  if support is None:
    return None
  early = gather(support.early.reshape(order.shape), order)
  return support._replace(early=jnp.pad(early, ((0, 0), (0, -order.shape[1] % chunk))))


def support_part(support: Support | None, start, chunk: int) -> Support | None:
  """As `part_of`, of a support."""
  return support and support._replace(early=part_of(support.early, start, chunk))


def part_of(x, start, chunk):
  """Positions `start` to `start + chunk` of [S, N, ...]."""
  return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)


def logits_of(hidden, kernel):
  """float32[S, C, V] of hidden states [S, C, D]."""
  return jnp.einsum("SCD,DV->SCV", hidden, kernel, preferred_element_type=jnp.float32)


def is_target_of(logits, targets):
  """bool[S, C, V], true at the targets int32[S, C]."""
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[:, :, None]


def is_primal(x) -> bool:
  """Whether x is what a rule of differentiation is given of an argument."""
  return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def as_it_is(x):
  """Leaves an array where it is."""
  return x


def cross_entropy_sum(
  hidden,
  kernel,
  targets,
  weights,
  *,
  shards: int = 1,
  chunk: int = 128,
  place=as_it_is,
  scatter=as_it_is,
):
  """Weighted sum of next-token cross-entropies, differentiable in `hidden` and `kernel`.

  Args:
    hidden: float[B, T, D].
    kernel: float[D, V]; used in the dtype of `hidden`.
    targets: int32[B, T].
    weights: float32[B, T]; positions with weight 0 cost nothing.
    shards: over how many devices B is split; B rows fall into this many contiguous blocks.
    chunk: positions per shard whose logits exist at a time.
    place: array -> array, puts the kernel [D, V] and what comes of it [shards, .., V] where they
      shall be over devices; a kernel that ZeRO splits is brought together before the loop.
    scatter: array -> array, puts the kernel's gradient [D, V] where it shall be.

  Returns:
    float32[], sum over positions of -weight * log softmax(hidden @ kernel)[target].
  """
  return _cross_entropy_sum(hidden, kernel, targets, weights, shards, chunk, place, scatter)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cross_entropy_sum(hidden, kernel, targets, weights, shards, chunk, place, scatter):
  del scatter
  losses, _ = token_statistics(
    hidden, kernel, targets, weights, shards=shards, chunk=chunk, place=place
  )
  return jnp.sum(losses * weights)


def _own_scale(dtype) -> float:
  """By which gradients are multiplied while they are made: before the loss's factor is known.

  In float16 those of unlikely tokens would else be 0, whatever the loss is multiplied by.
  """
  return 2.0**12 if dtype == jnp.float16 else 1.0


def _forward(hidden, kernel, targets, weights, shards, chunk, place, scatter):
  scale = _own_scale(hidden.value.dtype)
  total, *gradients = _sum_and_gradients(
    hidden.value,
    kernel.value,
    targets.value,
    weights.value * scale,
    with_kernel=kernel.perturbed,
    shards=shards,
    chunk=chunk,
    place=place,
    scatter=scatter,
  )
  return total / scale, gradients


def _sum_and_gradients(
  hidden,
  kernel,
  targets,
  weights,
  *,
  with_kernel: bool,
  shards,
  chunk,
  place,
  scatter,
  support: Support | None = None,
):
  """`cross_entropy_sum`, its gradients by `hidden` and, if asked for, by `kernel` (else None)."""
  shape, kernel_dtype = hidden.shape, kernel.dtype
  kernel = place(kernel.astype(hidden.dtype))
  hidden, targets, weights, order, chunks = compact(hidden, targets, weights, shards, chunk)
  support = compact_support(support, order, chunk)

  def body(i, carry):
    total, hidden_grad, kernel_grad = carry
    start = i * chunk
    h, t, w = (part_of(x, start, chunk) for x in (hidden, targets, weights))
    logits = restrict(place(logits_of(h, kernel)), support_part(support, start, chunk))
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    is_target = is_target_of(logits, t)
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    total += jnp.sum(w * (normaliser - target_logits))
    probabilities = jnp.exp(logits - normaliser[:, :, None])
    grad = ((probabilities - is_target) * w[:, :, None]).astype(h.dtype)
    h_grad = jnp.einsum("SCV,DV->SCD", grad, kernel)
    hidden_grad = jax.lax.dynamic_update_slice_in_dim(hidden_grad, h_grad, start, axis=1)
    if with_kernel:
      # A sum per shard: adding over shards here would mean a reduction across devices per chunk.
      kernel_grad += jnp.einsum("SCD,SCV->SDV", h, grad, preferred_element_type=jnp.float32)
    return total, hidden_grad, kernel_grad

  kernel_grad = jnp.zeros((), jnp.float32)
  if with_kernel:
    kernel_grad = place(jnp.zeros((shards, *kernel.shape), jnp.float32))
  carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(hidden), kernel_grad)
  total, hidden_grad, kernel_grad = jax.lax.fori_loop(0, chunks, body, carry)
  hidden_grad = gather(hidden_grad, jnp.argsort(order, axis=1)).reshape(shape)
  if with_kernel:
    kernel_grad = scatter(jnp.sum(kernel_grad, axis=0)).astype(kernel_dtype)
    # Else the sum may wait, and its operand be held whole, until all layers' gradients are made.
    hidden_grad, kernel_grad = jax.lax.optimization_barrier((hidden_grad, kernel_grad))
  return total, hidden_grad, kernel_grad if with_kernel else None


def _backward(shards, chunk, place, scatter, residuals, cotangent):
  del shards, chunk, place, scatter
  hidden_grad, kernel_grad = residuals
  cotangent = cotangent / _own_scale(hidden_grad.dtype)
  return (
    hidden_grad * cotangent.astype(hidden_grad.dtype),
    None if kernel_grad is None else kernel_grad * cotangent.astype(kernel_grad.dtype),
    None,
    None,
  )


_cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def token_log_probabilities(
  hidden,
  kernel,
  targets,
  weights,
  *,
  shards: int = 1,
  chunk: int = 128,
  place=as_it_is,
  scatter=as_it_is,
  support: Support | None = None,
):
  """Log-probability of each weighted target, differentiable in `hidden` and `kernel`.

  The backward pass computes logits again, for positions with a non-zero cotangent only: what a loss
  makes of the log-probabilities is not known in the forward pass.

  Args:
    hidden, kernel, targets, weights, shards, chunk, place, scatter: as in `cross_entropy_sum`; of
      the weights only whether they are 0 counts.
    support: what is left out of the softmax; None: nothing.

  Returns:
    float32[B, T], log softmax(hidden @ kernel)[target] where the weight is not 0, else 0.
  """
  settings = shards, chunk, place, scatter
  return _token_log_probabilities(hidden, kernel, targets, weights, support, *settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _token_log_probabilities(
  hidden, kernel, targets, weights, support, shards, chunk, place, scatter
):
  del scatter
  losses, _ = token_statistics(
    hidden, kernel, targets, weights, shards=shards, chunk=chunk, place=place, support=support
  )
  return -losses


def _log_probabilities_forward(hidden, kernel, targets, weights, support, *settings):
  support = jax.tree.map(lambda x: x.value, support, is_leaf=is_primal)
  inputs = (hidden.value, kernel.value, targets.value, weights.value, support)
  # What is known when tracing goes to the backward pass as structure: residuals are arrays.
  with_kernel = () if kernel.perturbed else None
  return _token_log_probabilities(*inputs, *settings), (inputs, with_kernel)


def _log_probabilities_backward(shards, chunk, place, scatter, residuals, cotangent):
  (hidden, kernel, targets, weights, support), with_kernel = residuals
  _, hidden_grad, kernel_grad = _sum_and_gradients(
    hidden,
    kernel,
    targets,
    jnp.where(weights != 0, -cotangent, 0.0),  # sum of -(-cotangent) * log-probability
    with_kernel=with_kernel is not None,
    shards=shards,
    chunk=chunk,
    place=place,
    scatter=scatter,
    support=support,
  )
  return hidden_grad, kernel_grad, None, None, None


_token_log_probabilities.defvjp(
  _log_probabilities_forward, _log_probabilities_backward, symbolic_zeros=True
)


def token_statistics(
  hidden,
  kernel,
  targets,
  weights,
  *,
  shards: int = 1,
  chunk: int = 128,
  place=as_it_is,
  support: Support | None = None,
):
  """Cross-entropy and greedy correctness of each weighted position, without gradient.

  Args:
    hidden, kernel, targets, weights, shards, chunk, place: as in `cross_entropy_sum`.
    support: what is left out of the softmax; None: nothing.

  Returns:
    float32[B, T] cross-entropies and bool[B, T] whether the target is the argmax; 0 and False where
    the weight is 0.
  """
  shape = targets.shape
  kernel = place(kernel.astype(hidden.dtype))
  hidden, targets, weights, order, chunks = compact(hidden, targets, weights, shards, chunk)
  support = compact_support(support, order, chunk)

  def body(i, carry):
    losses, correct = carry
    start = i * chunk
    h, t, w = (part_of(x, start, chunk) for x in (hidden, targets, weights))
    logits = restrict(place(logits_of(h, kernel)), support_part(support, start, chunk))
    target_logits = jnp.sum(jnp.where(is_target_of(logits, t), logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - target_logits
    right = jnp.argmax(logits, axis=-1) == t
    return (
      jax.lax.dynamic_update_slice_in_dim(losses, jnp.where(w != 0, loss, 0.0), start, axis=1),
      jax.lax.dynamic_update_slice_in_dim(correct, right & (w != 0), start, axis=1),
    )

  carry = (jnp.zeros(weights.shape, jnp.float32), jnp.zeros(weights.shape, bool))
  losses, correct = jax.lax.fori_loop(0, chunks, body, carry)
  back = jnp.argsort(order, axis=1)
  return gather(losses, back).reshape(shape), gather(correct, back).reshape(shape)
