"""Rows in groups: every device holds its share of each group, one group after the other."""

import itertools

import jax.numpy as jnp
from jax.sharding import Mesh

from vlalign_jax.sharding.mesh import row_blocks


def split(x, sizes: tuple[int, ...], mesh: Mesh | None, axis: int = 0) -> list:
  """Splits an axis of rows into groups; moves nothing between devices.

  Args:
    x: [.., B, ..].
    sizes: rows of each group over all devices; they sum to B.
    mesh: splits the rows.
    axis: of the rows.
  """
  if len(sizes) == 1:
    return [x]
  blocks, shape = row_blocks(mesh), x.shape
  by_block = x.reshape(*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
  ends = [*itertools.accumulate(size // blocks for size in sizes)]
  return [
    part.reshape(*shape[:axis], size, *shape[axis + 1 :])
    for part, size in zip(jnp.split(by_block, ends[:-1], axis + 1), sizes, strict=True)
  ]


def join(parts: list, mesh: Mesh | None):
  """Joins groups of rows [Bi, ..] that `split` has made, to [B, ..]."""
  if len(parts) == 1:
    return parts[0]
  blocks = row_blocks(mesh)
  by_block = [part.reshape(blocks, len(part) // blocks, *part.shape[1:]) for part in parts]
  joined = jnp.concatenate(by_block, axis=1)
  return joined.reshape(-1, *joined.shape[2:])
