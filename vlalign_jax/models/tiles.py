"""Attention in tiles of some queries and some keys, on any platform.

Softmax statistics are accumulated over the tiles, and the backward pass computes a tile's weights
again from the saved normalizer (Dao et al. 2022, FlashAttention), so that only one tile of scores
per head exists at a time. Multi-modal causal attention has two softmaxes, over text keys and over
image keys: each class of keys has its own statistics, and a tile's scores serve both.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Accelerators are fastest with few large products, CPUs with tiles of one row that fit their cache.
TILE = 512
CPU_TILE = 64
# Instead of -inf. Maxima start above it, so that a query without visible keys has no weights.
_HIDDEN = -1e30
_LOWEST = _HIDDEN / 2


class Layout(NamedTuple):
  """The arrays that decide which keys a query sees, see `models.attention`.

  An example's tokens are contiguous in its row.
  """

  segments: jax.Array  # int32[B, T]
  branches: jax.Array | None = None  # int32[B, T]; None: all of branch 0
  positions: jax.Array | None = None  # int32[B, T], from 0 in every example; only windows need them
  images: jax.Array | None = None  # bool[B, T], image tokens, a class of their own; None: one class


def visible(query: Layout, key: Layout, query_index, key_index, window: int | None = None):
  """Returns which keys each query sees.

  Args:
    query: layout of T queries.
    key: layout of S keys.
    query_index, key_index: int32[T] and int32[S], indices in the row.
    window: how many positions a query sees, up to and including its own; None: all.

  Returns:
    bool[B, T, S].
  """
  same_segment = query.segments[:, :, None] == key.segments[:, None, :]
  mask = (key_index <= query_index[:, None]) & same_segment
  if key.branches is not None:
    prompt = key.branches[:, None, :] == 0
    mask &= prompt | (query.branches[:, :, None] == key.branches[:, None, :])
  if window is not None:
    mask &= query.positions[:, :, None] - key.positions[:, None, :] < window
  if key.images is not None:
    both_images = query.images[:, :, None] & key.images[:, None, :]
    mask &= ~both_images | (key_index == query_index[:, None])
  return mask


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
  """Computes attention of queries and keys grouped by key head.

  Args:
    query: float[B, K, G, T, D].
    key, value: float[B, K, S, D]; S = T if there is a layout.
    layout: of the rows; None: every query sees all keys.
    tile: queries, and keys, at a time.
    row_shards: 0: all rows at once. Otherwise the number of devices over which rows are split; each
      device computes its rows one by one, and skips tiles without a visible key.
    window: see `visible`.

  Returns:
    float[B, K, G, T, D] in the query's dtype.
  """
  return _attend(query, key, value, layout, tile, row_shards, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(query, key, value, layout, tile, row_shards, window):
  return _forward(query, key, value, layout, tile, row_shards, window)[0]


def _forward(query, key, value, layout, tile, row_shards, window):
  arrays, tiles = _pad((query, key, value), layout, tile, row_shards > 0, window)
  attend = functools.partial(_attend_tiles, tiles=tiles)
  attended, normalizer = _map_rows(attend, row_shards, *arrays)
  attended = [class_attended[:, :, :, : query.shape[3]] for class_attended in attended]
  return sum(attended[1:], attended[0]), (query, key, value, layout, attended, normalizer)


def _backward(tile, row_shards, window, residuals, cotangent):
  query, key, value, layout, attended, normalizer = residuals
  T, S = query.shape[3], key.shape[2]
  # Row sums of weights * their gradients, without the weights (Dao et al. 2022, appendix B.2).
  inner = [
    jnp.sum(class_attended.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    for class_attended in attended
  ]
  arrays, tiles = _pad((query, key, value, cotangent, inner), layout, tile, row_shards > 0, window)
  compute = functools.partial(_compute_gradients, tiles=tiles)
  query_grad, key_grad, value_grad = _map_rows(compute, row_shards, normalizer, *arrays)
  return (
    query_grad[:, :, :, :T].astype(query.dtype),
    key_grad[:, :, :S].astype(key.dtype),
    value_grad[:, :, :S].astype(value.dtype),
    None,
  )


_attend.defvjp(_forward, _backward)


class Cut(NamedTuple):
  """`count` tiles of `size` tokens; the first `tokens` tokens are real, the others padding."""

  size: int
  count: int
  tokens: int

  def slice(self, x, i, axis):
    """Returns tile i of an array."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis)

  def update(self, x, part, i, axis):
    """Returns the array with tile i replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * self.size, axis)


class Tiles(NamedTuple):
  """How rows are cut into tiles."""

  queries: Cut
  keys: Cut  # the same as `queries` if there is a layout
  skips: bool  # whether to skip tiles without a visible key
  window: int | None


def _cut(tokens: int, tile: int) -> Cut:
  count = -(-tokens // tile)
  return Cut(-(-tokens // count), count, tokens)


def _pad(arrays, layout: Layout | None, tile: int, skips: bool, window: int | None):
  """Pads T and S (axis 3 of queries, 2 of keys, 1 of the layout) to equal tiles of at most `tile`.

  Returns:
    (*padded arrays, padded layout, first tile of keys of each tile of queries), tiles
  """
  query, key, value, *rest = arrays
  tiles = Tiles(_cut(query.shape[3], tile), _cut(key.shape[2], tile), skips, window)

  def pad(x, axis, cut):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, cut.count * cut.size - cut.tokens)
    return jnp.pad(x, widths)

  def pad_queries(tree, axis):
    return jax.tree.map(lambda x: pad(x, axis, tiles.queries), tree)

  # Padding comes after all real keys: causal queries do not see it, `_scores` hides it from others.
  keys = (pad(x, 2, tiles.keys) for x in (key, value))
  padded = [pad_queries(query, 3), *keys, *(pad_queries(x, 3) for x in rest)]
  layout = pad_queries(layout, 1)
  return (*padded, layout, _first_tiles(layout, tiles)), tiles


def _first_tiles(layout: Layout | None, tiles: Tiles):
  """Returns int32[B, count], for each tile of queries the first tile with a visible key."""
  if layout is None or not tiles.skips:
    return None
  segments = layout.segments
  index = jnp.arange(segments.shape[1])
  changes = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
  first = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
  if tiles.window is not None and layout.positions is not None:
    # With branches, tokens are further apart in the row than in positions, never closer.
    first += jnp.maximum(layout.positions - tiles.window + 1, 0)
  return first.reshape(len(first), -1, tiles.queries.size).min(axis=2) // tiles.keys.size


def _map_rows(function, shards: int, *arrays):
  """Calls `function` on all rows at once (shards = 0), or on one row of each shard at a time."""
  if not shards:
    return function(*arrays)

  def split(x):
    return x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  results = jax.lax.map(lambda row: function(*row), jax.tree.map(split, arrays))
  return jax.tree.map(join, results)


def _scores(query, key, layout, tiles: Tiles, i, j):
  """Returns float32[B, K, G, T, S] of query tile i and key tile j; _HIDDEN if not visible."""
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
  """Returns bool[B, 1, 1, 1, S], image keys of key tile j; None if all keys are one class."""
  if layout is None or layout.images is None:
    return None
  return tiles.keys.slice(layout.images, j, 1)[:, None, None, None]


def _keys_of(i, layout, first_tiles, tiles: Tiles):
  """Returns (first, end) of the key tiles that query tile i needs."""
  if layout is None:
    return 0, tiles.keys.count
  if first_tiles is not None:
    return jnp.min(first_tiles[:, i]), i + 1
  if tiles.window is None or layout.branches is not None:
    return 0, i + 1
  # Without branches, tokens are as far apart in the row as in positions.
  return jnp.maximum(i * tiles.queries.size - tiles.window + 1, 0) // tiles.keys.size, i + 1


def _add_keys(statistics, scores, values):
  """Updates (highest score, sum of exponentials, attended values) with another tile of keys."""
  highest, total, attended = statistics
  new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
  rescale = jnp.exp(highest - new_highest)
  weights = jnp.exp(scores - new_highest[..., None])
  part = jnp.einsum(
    "BKGTS,BKSD->BKGTD", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  total = total * rescale + jnp.sum(weights, axis=-1)
  return new_highest, total, attended * rescale[..., None] + part


def _attend_tiles(query, key, value, layout, first_tiles, *, tiles: Tiles):
  """Returns attended values, and the log of each query's sum of exponentials, per class of keys.

  A query that sees no key of a class has zeros for that class.

  Returns:
    ([like query], [float32[B, K, G, T]]), one per class: text and image keys, or all keys.
  """
  cut = tiles.queries
  classes = 1 if _image_keys(layout, tiles, 0) is None else 2

  def add_query_tile(i, carry):
    query_tile = cut.slice(query, i, 3)

    def add_key_tile(j, statistics):
      scores = _scores(query_tile, tiles.keys.slice(key, j, 2), layout, tiles, i, j)
      values, images = tiles.keys.slice(value, j, 2), _image_keys(layout, tiles, j)
      class_scores = [scores]
      if images is not None:
        class_scores = [jnp.where(images, _HIDDEN, scores), jnp.where(images, scores, _HIDDEN)]
      return [_add_keys(*args, values) for args in zip(statistics, class_scores, strict=True)]

    zeros = jnp.zeros(query_tile.shape[:-1], jnp.float32)
    start = [(zeros + _LOWEST, zeros, jnp.zeros(query_tile.shape, jnp.float32))] * classes
    key_tiles = _keys_of(i, layout, first_tiles, tiles)
    statistics = jax.lax.fori_loop(*key_tiles, add_key_tile, start)
    attended, normalizer = carry
    for n, (highest, total, class_attended) in enumerate(statistics):
      total = jnp.maximum(total, 1)  # at least 1 if any key is visible: exp(highest - highest)
      class_attended = (class_attended / total[..., None]).astype(query.dtype)
      attended[n] = cut.update(attended[n], class_attended, i, 3)
      normalizer[n] = cut.update(normalizer[n], highest + jnp.log(total), i, 3)
    return attended, normalizer

  carry = (
    [jnp.zeros_like(query)] * classes,
    [jnp.zeros(query.shape[:-1], jnp.float32)] * classes,
  )
  return jax.lax.fori_loop(0, cut.count, add_query_tile, carry)


def _compute_gradients(
  normalizer, query, key, value, cotangent, inner, layout, first_tiles, *, tiles: Tiles
):
  """Returns float32 gradients by query, key and value."""
  scale = query.shape[-1] ** -0.5
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add_query_tile(i, carry):
    query_grad, key_grad, value_grad = carry
    query_tile, out_grad, tile_normalizer, tile_inner = jax.tree.map(
      lambda x: tiles.queries.slice(x, i, 3), (query, cotangent, normalizer, inner)
    )

    def add_key_tile(j, carry):
      tile_grad, key_grad, value_grad = carry
      keys, values = tiles.keys.slice(key, j, 2), tiles.keys.slice(value, j, 2)
      images: Any = _image_keys(layout, tiles, j)

      def select_class(by_class):
        """Returns for every key the statistic of its class: [B, K, G, T, S or 1]."""
        text, *image = (x[..., None] for x in by_class)
        return jnp.where(images, image[0], text) if image else text

      scores = _scores(query_tile, keys, layout, tiles, i, j)
      weights = jnp.exp(scores - select_class(tile_normalizer))
      scores_grad = product("BKGTD,BKSD->BKGTS", out_grad, values) - select_class(tile_inner)
      scores_grad = (weights * scores_grad * scale).astype(query.dtype)
      tile_grad += product("BKGTS,BKSD->BKGTD", scores_grad, keys)
      key_part = product("BKGTS,BKGTD->BKSD", scores_grad, query_tile)
      value_part = product("BKGTS,BKGTD->BKSD", weights.astype(value.dtype), out_grad)
      key_grad = tiles.keys.update(key_grad, tiles.keys.slice(key_grad, j, 2) + key_part, j, 2)
      value_part += tiles.keys.slice(value_grad, j, 2)
      return tile_grad, key_grad, tiles.keys.update(value_grad, value_part, j, 2)

    start = (jnp.zeros(query_tile.shape, jnp.float32), key_grad, value_grad)
    tile_grad, key_grad, value_grad = jax.lax.fori_loop(
      *_keys_of(i, layout, first_tiles, tiles), add_key_tile, start
    )
    return tiles.queries.update(query_grad, tile_grad, i, 3), key_grad, value_grad

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  return jax.lax.fori_loop(0, tiles.queries.count, add_query_tile, zeros)
