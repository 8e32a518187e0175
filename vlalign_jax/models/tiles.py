"""Attention in tiles of some queries and some keys, on any platform.

Running softmax statistics go over the tiles, and the backward pass computes a tile's weights again
from the saved normaliser (Dao et al. 2022, FlashAttention), so that no more than a tile of scores
per head exists at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Accelerators want few large products. A CPU wants the tile of one row to stay in its cache.
TILE = 512
CPU_TILE = 64
# Instead of -inf: exp(_HIDDEN - _HIDDEN) is a number, which the first visible key scales to zero.
_HIDDEN = -1e30


class Layout(NamedTuple):
  """What decides who sees whom, see `models.attention`.

  An example's tokens are neighbours in its row.
  """

  segments: jax.Array  # int32[B, T]
  branches: jax.Array | None  # int32[B, T]; None: all of branch 0


def visible(query: Layout, key: Layout, query_index, key_index):
  """The attention rule.

  Args:
    query: of T queries.
    key: of S keys.
    query_index, key_index: int32[T] and int32[S], places in the row.

  Returns:
    bool[B, T, S], true where the query sees the key.
  """
  same_segment = query.segments[:, :, None] == key.segments[:, None, :]
  sees = (key_index <= query_index[:, None]) & same_segment
  if key.branches is None:
    return sees
  prompt = key.branches[:, None, :] == 0
  same_branch = query.branches[:, :, None] == key.branches[:, None, :]
  return sees & (prompt | same_branch)


def attend(query, key, value, layout: Layout | None, *, tile: int, row_shards: int = 0):
  """Attention in the order of axes that products want.

  Args:
    query: float[B, K, G, T, D].
    key, value: float[B, K, T, D].
    layout: of the rows; None: everything sees everything.
    tile: queries, and keys, at a time.
    row_shards: 0: all rows at once. Else one row of each of so many devices after the other, which
      skips tiles that hold no key of the queries' examples.

  Returns:
    float[B, K, G, T, D] in the query's dtype.
  """
  return _attend(query, key, value, layout, tile, row_shards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, layout, tile, row_shards):
  return _forward(query, key, value, layout, tile, row_shards)[0]


def _forward(query, key, value, layout, tile, row_shards):
  arrays, tiles = _padded((query, key, value), layout, tile, row_shards > 0)
  mixed, normaliser = _by_row(functools.partial(_mix, tiles=tiles), row_shards, *arrays)
  mixed = mixed[:, :, :, : query.shape[3]]
  return mixed, (query, key, value, layout, mixed, normaliser)


def _backward(tile, row_shards, residuals, cotangent):
  query, key, value, layout, mixed, normaliser = residuals
  T = query.shape[3]
  # Row sums of weights * their gradients, without the weights (Dao et al. 2022, appendix B.2).
  inner = jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  arrays, tiles = _padded((query, key, value, cotangent, inner), layout, tile, row_shards > 0)
  gradients = functools.partial(_mix_gradients, tiles=tiles)
  query_grad, key_grad, value_grad = _by_row(gradients, row_shards, normaliser, *arrays)
  return (
    query_grad[:, :, :, :T].astype(query.dtype),
    key_grad[:, :, :T].astype(key.dtype),
    value_grad[:, :, :T].astype(value.dtype),
    None,
  )


_attend.defvjp(_forward, _backward)


class Tiles(NamedTuple):
  """How a row is cut: `count` tiles of `size`, the first `tokens` of which are real."""

  size: int
  count: int
  tokens: int
  skips: bool  # whether tiles without a key of the queries' examples are left out

  def slice(self, x, i, axis):
    """Tile i of an array."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis)

  def update(self, x, part, i, axis):
    """The array with another tile i."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * self.size, axis)


def _padded(arrays, layout: Layout | None, tile: int, skips: bool):
  """Pads T (axis 3 of queries, 2 of keys, 1 of the layout) to equal tiles of at most `tile`.

  Returns:
    (the padded arrays, the padded layout and the first tile of keys of each tile of queries), tiles
  """
  T = arrays[0].shape[3]
  count = -(-T // tile)
  size = -(-T // count)
  tiles = Tiles(size, count, T, skips)

  def pad(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - T)
    return jnp.pad(x, widths)

  query, key, value, *rest = arrays
  # Padding comes after all real keys: no real query looks there, or it is masked below.
  padded = [pad(query, 3), pad(key, 2), pad(value, 2), *(pad(x, 3) for x in rest)]
  layout = jax.tree.map(lambda x: pad(x, 1), layout)
  return (*padded, layout, _first_tiles(layout, tiles)), tiles


def _first_tiles(layout: Layout | None, tiles: Tiles):
  """int32[B, count], for each tile of queries the first tile that holds a key of its examples."""
  if layout is None or not tiles.skips:
    return None
  segments = layout.segments
  index = jnp.arange(segments.shape[1])
  changes = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  starts = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
  return starts[:, :: tiles.size] // tiles.size


def _by_row(function, shards: int, *arrays):
  """Calls `function` on all rows at once (shards = 0), or on one row per shard after the other."""
  if not shards:
    return function(*arrays)

  def split(x):
    return x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  rows = jax.tree.map(split, arrays)
  return jax.tree.map(join, jax.lax.map(lambda row: function(*row), rows))


def _scores(query, key, layout, tiles: Tiles, i, j):
  """float32[B, K, G, size, size] of query tile i and key tile j; _HIDDEN where not seen."""
  scores = jnp.einsum("BKGTD,BKSD->BKGTS", query, key, preferred_element_type=jnp.float32)
  scores *= query.shape[-1] ** -0.5
  query_index = i * tiles.size + jnp.arange(tiles.size)
  key_index = j * tiles.size + jnp.arange(tiles.size)
  if layout is None:
    if tiles.tokens == tiles.size * tiles.count:
      return scores
    return jnp.where(key_index < tiles.tokens, scores, _HIDDEN)
  of_tile = functools.partial(tiles.slice, axis=1)
  queries, keys = (jax.tree.map(lambda x, n=n: of_tile(x, n), layout) for n in (i, j))
  mask = visible(queries, keys, query_index, key_index)
  return jnp.where(mask[:, None, None], scores, _HIDDEN)


def _keys_of(i, layout, first_tiles, tiles: Tiles):
  """(first, end) of the key tiles that query tile i looks at."""
  if layout is None:
    return 0, tiles.count
  return (0 if first_tiles is None else jnp.min(first_tiles[:, i])), i + 1


def _mix(query, key, value, layout, first_tiles, *, tiles: Tiles):
  """(mixed values like query, float32[B, K, G, T] log of each query's sum of exponentials)."""

  def of_queries(i, carry):
    own = tiles.slice(query, i, 3)

    def of_keys(j, carry):
      highest, total, mixed = carry
      scores = _scores(own, tiles.slice(key, j, 2), layout, tiles, i, j)
      new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
      rescale = jnp.exp(highest - new_highest)
      weights = jnp.exp(scores - new_highest[..., None])
      part = jnp.einsum(
        "BKGTS,BKSD->BKGTD",
        weights.astype(value.dtype),
        tiles.slice(value, j, 2),
        preferred_element_type=jnp.float32,
      )
      total = total * rescale + jnp.sum(weights, axis=-1)
      return new_highest, total, mixed * rescale[..., None] + part

    statistic = jnp.zeros(own.shape[:-1], jnp.float32)
    start = (statistic + _HIDDEN, statistic, jnp.zeros(own.shape, jnp.float32))
    highest, total, mixed = jax.lax.fori_loop(
      *_keys_of(i, layout, first_tiles, tiles), of_keys, start
    )
    mixed = (mixed / total[..., None]).astype(query.dtype)
    return (
      tiles.update(carry[0], mixed, i, 3),
      tiles.update(carry[1], highest + jnp.log(total), i, 3),
    )

  carry = (jnp.zeros_like(query), jnp.zeros(query.shape[:-1], jnp.float32))
  return jax.lax.fori_loop(0, tiles.count, of_queries, carry)


def _mix_gradients(
  normaliser, query, key, value, cotangent, inner, layout, first_tiles, *, tiles: Tiles
):
  """float32 gradients by query, key and value."""
  scale = query.shape[-1] ** -0.5
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def of_queries(i, carry):
    query_grad, key_grad, value_grad = carry
    own, out_grad = tiles.slice(query, i, 3), tiles.slice(cotangent, i, 3)
    own_normaliser = tiles.slice(normaliser, i, 3)[..., None]
    own_inner = tiles.slice(inner, i, 3)[..., None]

    def of_keys(j, carry):
      own_grad, key_grad, value_grad = carry
      keys, values = tiles.slice(key, j, 2), tiles.slice(value, j, 2)
      weights = jnp.exp(_scores(own, keys, layout, tiles, i, j) - own_normaliser)
      weights_grad = product("BKGTD,BKSD->BKGTS", out_grad, values)
      scores_grad = (weights * (weights_grad - own_inner) * scale).astype(query.dtype)
      own_grad += product("BKGTS,BKSD->BKGTD", scores_grad, keys)
      key_part = product("BKGTS,BKGTD->BKSD", scores_grad, own)
      value_part = product("BKGTS,BKGTD->BKSD", weights.astype(value.dtype), out_grad)
      key_grad = tiles.update(key_grad, tiles.slice(key_grad, j, 2) + key_part, j, 2)
      value_grad = tiles.update(value_grad, tiles.slice(value_grad, j, 2) + value_part, j, 2)
      return own_grad, key_grad, value_grad

    start = (jnp.zeros(own.shape, jnp.float32), key_grad, value_grad)
    own_grad, key_grad, value_grad = jax.lax.fori_loop(
      *_keys_of(i, layout, first_tiles, tiles), of_keys, start
    )
    return tiles.update(query_grad, own_grad, i, 3), key_grad, value_grad

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  return jax.lax.fori_loop(0, tiles.count, of_queries, zeros)
