"""Attention in tiles of some queries and some keys, on any platform.

Running softmax statistics go over the tiles, and the backward pass computes a tile's weights again
from the saved normaliser (Dao et al. 2022, FlashAttention), so that no more than a tile of scores
per head exists at a time. Multi-modal causal attention has two softmaxes, over text keys and over
image keys: statistics are kept of each class of keys, and a tile's scores serve both.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Accelerators want few large products. A CPU wants the tile of one row to stay in its cache.
TILE = 512
CPU_TILE = 64
# Instead of -inf. Maxima begin above it, so that hidden keys weigh nothing even among themselves.
_HIDDEN = -1e30
_LOWEST = _HIDDEN / 2


class Layout(NamedTuple):
  """What decides who sees whom, see `models.attention`.

  An example's tokens are neighbours in its row.
  """

  segments: jax.Array  # int32[B, T]
  branches: jax.Array | None = None  # int32[B, T]; None: all of branch 0
  positions: jax.Array | None = None  # int32[B, T], from 0 in every example; read for windows only
  images: jax.Array | None = None  # bool[B, T], image tokens, a class of their own; None: one class


def visible(query: Layout, key: Layout, query_index, key_index, window: int | None = None):
  """The attention rule.

  Args:
    query: of T queries.
    key: of S keys.
    query_index, key_index: int32[T] and int32[S], places in the row.
    window: how many positions back a query sees, its own included; None: all.

  Returns:
    bool[B, T, S], true where the query sees the key.
  """
  same_segment = query.segments[:, :, None] == key.segments[:, None, :]
  sees = (key_index <= query_index[:, None]) & same_segment
  if key.branches is not None:
    prompt = key.branches[:, None, :] == 0
    sees &= prompt | (query.branches[:, :, None] == key.branches[:, None, :])
  if window is not None:
    sees &= query.positions[:, :, None] - key.positions[:, None, :] < window
  if key.images is not None:
    both_images = query.images[:, :, None] & key.images[:, None, :]
    sees &= ~both_images | (key_index == query_index[:, None])
  return sees


def attend(
  query,
  key,
  value,
  layout: Layout | None,
  *,
  tile: int,
  row_shards: int = 0,
  window: int | None = None,
):
  """Attention in the order of axes that products want.

  Args:
    query: float[B, K, G, T, D].
    key, value: float[B, K, S, D]; S = T if there is a layout.
    layout: of the rows; None: everything sees everything.
    tile: queries, and keys, at a time.
    row_shards: 0: all rows at once. Else one row of each of so many devices after the other, which
      skips tiles that hold no key that its queries may see.
    window: see `visible`.

  Returns:
    float[B, K, G, T, D] in the query's dtype.
  """
  return _attend(query, key, value, layout, tile, row_shards, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(query, key, value, layout, tile, row_shards, window):
  return _forward(query, key, value, layout, tile, row_shards, window)[0]


def _forward(query, key, value, layout, tile, row_shards, window):
  arrays, tiles = _padded((query, key, value), layout, tile, row_shards > 0, window)
  mixed, normaliser = _by_row(functools.partial(_mix, tiles=tiles), row_shards, *arrays)
  mixed = [of_class[:, :, :, : query.shape[3]] for of_class in mixed]
  return sum(mixed[1:], mixed[0]), (query, key, value, layout, mixed, normaliser)


def _backward(tile, row_shards, window, residuals, cotangent):
  query, key, value, layout, mixed, normaliser = residuals
  T, S = query.shape[3], key.shape[2]
  # Row sums of weights * their gradients, without the weights (Dao et al. 2022, appendix B.2).
  inner = [
    jnp.sum(of_class.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    for of_class in mixed
  ]
  given = (query, key, value, cotangent, inner)
  arrays, tiles = _padded(given, layout, tile, row_shards > 0, window)
  gradients = functools.partial(_mix_gradients, tiles=tiles)
  query_grad, key_grad, value_grad = _by_row(gradients, row_shards, normaliser, *arrays)
  return (
    query_grad[:, :, :, :T].astype(query.dtype),
    key_grad[:, :, :S].astype(key.dtype),
    value_grad[:, :, :S].astype(value.dtype),
    None,
  )


_attend.defvjp(_forward, _backward)


class Cut(NamedTuple):
  """`count` tiles of `size`, the first `tokens` of which are real."""

  size: int
  count: int
  tokens: int

  def slice(self, x, i, axis):
    """Tile i of an array."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis)

  def update(self, x, part, i, axis):
    """The array with another tile i."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * self.size, axis)


class Tiles(NamedTuple):
  """How rows are cut, and what of their layout is the same for all."""

  queries: Cut
  keys: Cut  # as the queries if there is a layout
  skips: bool  # whether tiles without a key that the queries may see are left out
  window: int | None


def _cut(tokens: int, tile: int) -> Cut:
  count = -(-tokens // tile)
  return Cut(-(-tokens // count), count, tokens)


def _padded(arrays, layout: Layout | None, tile: int, skips: bool, window: int | None):
  """Pads T and S (axis 3 of queries, 2 of keys, 1 of the layout) to equal tiles of at most `tile`.

  Returns:
    (the padded arrays, the padded layout and the first tile of keys of each tile of queries), tiles
  """
  query, key, value, *rest = arrays
  tiles = Tiles(_cut(query.shape[3], tile), _cut(key.shape[2], tile), skips, window)

  def pad(x, axis, cut):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, cut.count * cut.size - cut.tokens)
    return jnp.pad(x, widths)

  def of_queries(tree, axis):
    return jax.tree.map(lambda x: pad(x, axis, tiles.queries), tree)

  # Padding comes after all real keys: no real query looks there, or it is masked below.
  keys = (pad(x, 2, tiles.keys) for x in (key, value))
  padded = [of_queries(query, 3), *keys, *(of_queries(x, 3) for x in rest)]
  layout = of_queries(layout, 1)
  return (*padded, layout, _first_tiles(layout, tiles)), tiles


def _first_tiles(layout: Layout | None, tiles: Tiles):
  """int32[B, count], for each tile of queries the first tile with a key that they may see."""
  if layout is None or not tiles.skips:
    return None
  segments = layout.segments
  index = jnp.arange(segments.shape[1])
  changes = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  first = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
  if tiles.window is not None and layout.positions is not None:
    # Branches only push tokens further behind than their positions say.
    first += jnp.maximum(layout.positions - tiles.window + 1, 0)
  return first.reshape(len(first), -1, tiles.queries.size).min(axis=2) // tiles.keys.size


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
  """float32[B, K, G, T, S] of query tile i and key tile j; _HIDDEN where not seen."""
  scores = jnp.einsum("BKGTD,BKSD->BKGTS", query, key, preferred_element_type=jnp.float32)
  scores *= query.shape[-1] ** -0.5
  key_index = j * tiles.keys.size + jnp.arange(tiles.keys.size)
  if layout is None:
    if tiles.keys.tokens == tiles.keys.size * tiles.keys.count:
      return scores
    return jnp.where(key_index < tiles.keys.tokens, scores, _HIDDEN)
  query_index = i * tiles.queries.size + jnp.arange(tiles.queries.size)
  queries, keys = (
    jax.tree.map(lambda x, cut=cut, n=n: cut.slice(x, n, 1), layout)
    for cut, n in ((tiles.queries, i), (tiles.keys, j))
  )
  mask = visible(queries, keys, query_index, key_index, tiles.window)
  return jnp.where(mask[:, None, None], scores, _HIDDEN)


def _image_keys(layout, tiles: Tiles, j):
  """bool[B, 1, 1, 1, S] of key tile j; None if keys are of one class."""
  if layout is None or layout.images is None:
    return None
  return tiles.keys.slice(layout.images, j, 1)[:, None, None, None]


def _keys_of(i, layout, first_tiles, tiles: Tiles):
  """(first, end) of the key tiles that query tile i looks at."""
  if layout is None:
    return 0, tiles.keys.count
  if first_tiles is not None:
    return jnp.min(first_tiles[:, i]), i + 1
  if tiles.window is None or layout.branches is not None:
    return 0, i + 1
  # Without branches, who is so many places behind is so many positions behind.
  return jnp.maximum(i * tiles.queries.size - tiles.window + 1, 0) // tiles.keys.size, i + 1


def _add_keys(statistics, scores, values):
  """Running (highest score, sum of exponentials, mixed values) with the keys of another tile."""
  highest, total, mixed = statistics
  new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
  rescale = jnp.exp(highest - new_highest)
  weights = jnp.exp(scores - new_highest[..., None])
  part = jnp.einsum(
    "BKGTS,BKSD->BKGTD", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  total = total * rescale + jnp.sum(weights, axis=-1)
  return new_highest, total, mixed * rescale[..., None] + part


def _mix(query, key, value, layout, first_tiles, *, tiles: Tiles):
  """Of each class of keys: mixed values, and the log of each query's sum of exponentials.

  A query that sees no key of a class gets zeros of it.

  Returns:
    ([like query], [float32[B, K, G, T]]), one per class: text and image keys, or all keys.
  """
  cut = tiles.queries
  classes = 1 if _image_keys(layout, tiles, 0) is None else 2

  def of_queries(i, carry):
    own = cut.slice(query, i, 3)

    def of_keys(j, statistics):
      scores = _scores(own, tiles.keys.slice(key, j, 2), layout, tiles, i, j)
      values, images = tiles.keys.slice(value, j, 2), _image_keys(layout, tiles, j)
      by_class = [scores]
      if images is not None:
        by_class = [jnp.where(images, _HIDDEN, scores), jnp.where(images, scores, _HIDDEN)]
      return [_add_keys(*of_class, values) for of_class in zip(statistics, by_class, strict=True)]

    zeros = jnp.zeros(own.shape[:-1], jnp.float32)
    start = [(zeros + _LOWEST, zeros, jnp.zeros(own.shape, jnp.float32))] * classes
    found = jax.lax.fori_loop(*_keys_of(i, layout, first_tiles, tiles), of_keys, start)
    mixed, normaliser = carry
    for place, (highest, total, of_class) in enumerate(found):
      total = jnp.maximum(total, 1)  # the highest score alone gives 1
      of_class = (of_class / total[..., None]).astype(query.dtype)
      mixed[place] = cut.update(mixed[place], of_class, i, 3)
      normaliser[place] = cut.update(normaliser[place], highest + jnp.log(total), i, 3)
    return mixed, normaliser

  carry = (
    [jnp.zeros_like(query)] * classes,
    [jnp.zeros(query.shape[:-1], jnp.float32)] * classes,
  )
  return jax.lax.fori_loop(0, cut.count, of_queries, carry)


def _mix_gradients(
  normaliser, query, key, value, cotangent, inner, layout, first_tiles, *, tiles: Tiles
):
  """float32 gradients by query, key and value."""
  scale = query.shape[-1] ** -0.5
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def of_queries(i, carry):
    query_grad, key_grad, value_grad = carry
    own, out_grad, own_normaliser, own_inner = jax.tree.map(
      lambda x: tiles.queries.slice(x, i, 3), (query, cotangent, normaliser, inner)
    )

    def of_keys(j, carry):
      own_grad, key_grad, value_grad = carry
      keys, values = tiles.keys.slice(key, j, 2), tiles.keys.slice(value, j, 2)
      images: Any = _image_keys(layout, tiles, j)

      def of_class(by_class):
        """What is known of each class of keys, for every key: [B, K, G, T, S or 1]."""
        text, *image = (x[..., None] for x in by_class)
        return jnp.where(images, image[0], text) if image else text

      weights = jnp.exp(_scores(own, keys, layout, tiles, i, j) - of_class(own_normaliser))
      weights_grad = product("BKGTD,BKSD->BKGTS", out_grad, values)
      scores_grad = (weights * (weights_grad - of_class(own_inner)) * scale).astype(query.dtype)
      own_grad += product("BKGTS,BKSD->BKGTD", scores_grad, keys)
      key_part = product("BKGTS,BKGTD->BKSD", scores_grad, own)
      value_part = product("BKGTS,BKGTD->BKSD", weights.astype(value.dtype), out_grad)
      key_grad = tiles.keys.update(key_grad, tiles.keys.slice(key_grad, j, 2) + key_part, j, 2)
      value_part += tiles.keys.slice(value_grad, j, 2)
      return own_grad, key_grad, tiles.keys.update(value_grad, value_part, j, 2)

    start = (jnp.zeros(own.shape, jnp.float32), key_grad, value_grad)
    own_grad, key_grad, value_grad = jax.lax.fori_loop(
      *_keys_of(i, layout, first_tiles, tiles), of_keys, start
    )
    return tiles.queries.update(query_grad, own_grad, i, 3), key_grad, value_grad

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  return jax.lax.fori_loop(0, tiles.queries.count, of_queries, zeros)
