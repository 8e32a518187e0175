"""Gradients of a sum over micro-batches, exact whatever each of them counts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.losses import sums as reported
from vlalign_jax.sharding.mesh import constrain_rows


def split_rows(batch, parts: int):
  """Reshapes arrays [B, ...] to [parts, B / parts, ...]; every device keeps its own rows."""

  def split(x):
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, batch)


def join_rows(x):
  """Inverts `split_rows` for one array."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def sum_gradients(
  loss,
  params,
  batch,
  parts: int,
  mesh: Mesh | None = None,
  constrain=lambda gradients: gradients,
  scale: Any = 1.0,
):
  """Computes a loss that is a sum, and its gradient, over micro-batches one after the other.

  Args:
    loss: `(params, batch, number of the micro-batch) -> (float32[] sum, dict of values as in
      `losses.sums`)`.
    params: tree to differentiate by.
    batch: dict of arrays whose first axis is a multiple of `parts`.
    parts: number of micro-batches.
    mesh: over which the batch is split.
    constrain: gradient tree -> tree, places gradients over devices.
    scale: float32[], by which the sum is multiplied where it is differentiated.

  Returns:
    (sum, dict of values, gradient tree of scale x sum, in float32 if parts > 1).
  """

  def scaled(params, batch, number):
    total, sums = loss(params, batch, number)
    return total * scale, (total, sums)

  def gradient(params, batch, number):
    (_, value), grads = jax.value_and_grad(scaled, has_aux=True)(params, batch, number)
    return value, constrain(grads)

  if parts == 1:
    (total, sums), grads = gradient(params, batch, 0)
    return total, sums, grads

  def body(carry, micro_batch):
    batch, number = micro_batch
    batch = jax.tree.map(lambda x: constrain_rows(x, mesh), batch)
    (total, sums), grads = gradient(params, batch, number)
    before, sums_before, grads_before = carry
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads_before, grads)
    return (before + total, reported.combine(sums_before, sums), grads), None

  batch = split_rows(batch, parts)
  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], batch), 0)
  (_, sums), grads = shapes
  grads = constrain(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grads))
  carry = jnp.zeros((), jnp.float32), reported.start(sums), grads
  carry, _ = jax.lax.scan(body, carry, (batch, jnp.arange(parts)))
  return carry
