"""Gradients of a sum over micro-batches, exact whatever each of them counts."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.losses import sums as reported
from vlalign_jax.sharding.mesh import constrain_rows


def split_rows(rows, parts: int):
  """[B, ...] arrays to [parts, B / parts, ...]; every device keeps its own rows."""

  def split(x):
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, rows)


def join_rows(x):
  """The inverse of `split_rows` for one array."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def sum_gradients(
  loss,
  params,
  rows,
  parts: int,
  mesh: Mesh | None = None,
  constrain=lambda gradients: gradients,
  scale=1.0,
):
  """Value and gradient of a loss that is a sum, over micro-batches one after the other.

  Args:
    loss: `(params, rows, number of the micro-batch) -> (float32[] sum, dict of values as in
      `losses.sums`)`.
    params: tree to differentiate by.
    rows: dict of arrays whose first axis is a multiple of `parts`.
    parts: number of micro-batches.
    mesh: over which rows are split.
    constrain: gradient tree -> tree, places gradients over devices.
    scale: float32[], by which the sum is multiplied where it is differentiated.

  Returns:
    (sum, dict of values, gradient tree of scale x sum, in float32 if parts > 1).
  """

  def scaled(params, rows, number):
    total, sums = loss(params, rows, number)
    return total * scale, (total, sums)

  def gradient(params, rows, number):
    (_, value), grads = jax.value_and_grad(scaled, has_aux=True)(params, rows, number)
    return value, constrain(grads)

  if parts == 1:
    (total, sums), grads = gradient(params, rows, 0)
    return total, sums, grads

  def body(carry, micro_batch):
    rows, number = micro_batch
    rows = jax.tree.map(lambda x: constrain_rows(x, mesh), rows)
    (total, sums), grads = gradient(params, rows, number)
    before, sums_before, grads_before = carry
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads_before, grads)
    return (before + total, reported.combine(sums_before, sums), grads), None

  rows = split_rows(rows, parts)
  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], rows), 0)
  (_, sums), grads = shapes
  grads = constrain(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grads))
  carry = jnp.zeros((), jnp.float32), reported.start(sums), grads
  carry, _ = jax.lax.scan(body, carry, (rows, jnp.arange(parts)))
  return carry
