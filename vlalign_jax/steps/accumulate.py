"""Gradients of a sum over micro-batches, exact whatever each of them counts."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.sharding.mesh import constrain_rows


def split_rows(rows, parts: int):
  """[B, ...] arrays to [parts, B / parts, ...]; every device keeps its own rows."""

  def split(x):
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, rows)


def sum_gradients(
  loss, params, rows, parts: int, mesh: Mesh | None = None, constrain=lambda gradients: gradients
):
  """Value and gradient of a loss that is a sum, over micro-batches one after the other.

  Args:
    loss: `(params, rows) -> (float32[] sum, dict of float32[] sums)`.
    params: tree to differentiate by.
    rows: dict of arrays whose first axis is a multiple of `parts`.
    parts: number of micro-batches.
    mesh: over which rows are split.
    constrain: gradient tree -> tree, places gradients over devices.

  Returns:
    (sum, dict of sums, gradient tree of the sum in float32 if parts > 1).
  """
  value_and_grad = jax.value_and_grad(loss, has_aux=True)

  def gradient(params, rows):
    value, grads = value_and_grad(params, rows)
    return value, constrain(grads)

  if parts == 1:
    (total, sums), grads = gradient(params, rows)
    return total, sums, grads

  def body(carry, rows):
    rows = jax.tree.map(lambda x: constrain_rows(x, mesh), rows)
    (total, sums), grads = gradient(params, rows)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (total, sums, grads)), None

  rows = split_rows(rows, parts)
  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], rows))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  (total, sums), grads = zeros
  carry, _ = jax.lax.scan(body, (total, sums, constrain(grads)), rows)
  return carry
