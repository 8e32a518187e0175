"""Attention over rows that hold several examples, each with a shared prompt and several answers.

One rule covers padding, packing and shared prompts: query q sees key k iff both are of the same
segment, k belongs to the prompt (branch 0) or to q's own branch, and k is not after q.

Queries are worked through in blocks, each against the keys up to its end, and the backward pass
computes the attention weights again from the saved normaliser (Dao et al. 2022, FlashAttention), so
that nothing of size [B, H, T, T] is ever held.
"""

import functools

import jax
import jax.numpy as jnp

# Accelerators want few large products. A CPU wants the scores of one block of one row to stay in
# its cache, which makes it three to five times as fast.
QUERY_BLOCK = 512
CPU_QUERY_BLOCK = 64


def visible(query_segments, query_branches, key_segments, key_branches, first_query: int = 0):
  """The attention rule of a row.

  Args:
    query_segments, query_branches: int32[B, T] of the queries.
    key_segments, key_branches: int32[B, S] of the keys, which start at the row's first token.
    first_query: index within the row of the first query.

  Returns:
    bool[B, T, S], true where the query sees the key.
  """
  T, S = query_segments.shape[1], key_segments.shape[1]
  not_after = jnp.arange(S) <= first_query + jnp.arange(T)[:, None]
  same_segment = query_segments[:, :, None] == key_segments[:, None, :]
  prompt = key_branches[:, None, :] == 0
  same_branch = query_branches[:, :, None] == key_branches[:, None, :]
  return not_after & same_segment & (prompt | same_branch)


def attend(query, key, value, segments=None, branches=None, *, shards: int = 1):
  """Softmax self-attention with grouped key/value heads and float32 statistics.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D] with H a multiple of K; head h reads key head h // (H / K).
    segments, branches: int32[B, T], for the rule above; None: everything sees everything.
    shards: over how many devices B is split, in contiguous blocks.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  B, T, H, D = query.shape
  K = key.shape[2]
  query = query.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  layout = () if segments is None else (segments, branches)

  def run(block, by_row):
    return lambda *arrays: _attend(*arrays, block, shards if by_row else 0)

  mixed = jax.lax.platform_dependent(
    query, key, value, layout, cpu=run(CPU_QUERY_BLOCK, True), default=run(QUERY_BLOCK, False)
  )
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, layout, block, row_shards):
  return _forward(query, key, value, layout, block, row_shards)[0]


def _forward(query, key, value, layout, block, row_shards):
  arrays = (query, key, value, layout)
  mixed, normaliser = _by_row(functools.partial(_mix, block=block), row_shards, *arrays)
  return mixed, (*arrays, mixed, normaliser)


def _backward(block, row_shards, residuals, cotangent):
  grads = _by_row(functools.partial(_mix_gradients, block=block), row_shards, *residuals, cotangent)
  return (*grads, None)


_attend.defvjp(_forward, _backward)


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


def _blocks(T: int, block: int, causal: bool):
  """(first query, end of queries, end of keys) of every block."""
  for start in range(0, T, block):
    stop = min(start + block, T)
    yield start, stop, stop if causal else T


def _scores(query, key, layout, start, stop, end):
  """float32[B, K, G, stop - start, end], -inf (nearly) where the query does not see the key."""
  scores = jnp.einsum(
    "BKGTD,BKSD->BKGTS",
    query[:, :, :, start:stop],
    key[:, :, :end],
    preferred_element_type=jnp.float32,
  )
  scores *= query.shape[-1] ** -0.5  # of the queries it would cost bfloat16 a rounding
  if not layout:
    return scores
  segments, branches = layout
  mask = visible(
    segments[:, start:stop], branches[:, start:stop], segments[:, :end], branches[:, :end], start
  )
  return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _mix(query, key, value, layout, *, block: int):
  """(mixed values like query, float32[B, K, G, T] log of each query's sum of exponentials)."""
  mixed, normalisers = [], []
  for start, stop, end in _blocks(query.shape[3], block, bool(layout)):
    scores = _scores(query, key, layout, start, stop, end)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
      "BKGTS,BKSD->BKGTD",
      weights.astype(value.dtype),
      value[:, :, :end],
      preferred_element_type=jnp.float32,
    )
    mixed.append((out / total).astype(query.dtype))
    normalisers.append((highest + jnp.log(total))[..., 0])
  return jnp.concatenate(mixed, axis=3), jnp.concatenate(normalisers, axis=3)


def _mix_gradients(query, key, value, layout, mixed, normaliser, cotangent, *, block: int):
  """Gradients by query, key and value (Dao et al. 2022, appendix B.2)."""
  scale = query.shape[-1] ** -0.5
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  query_grad = []
  key_grad, value_grad = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
  # Row sums of weights * their gradients, without the weights.
  inner = jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)
  for start, stop, end in _blocks(query.shape[3], block, bool(layout)):
    here = (slice(None),) * 3 + (slice(start, stop),)
    scores = _scores(query, key, layout, start, stop, end)
    weights = jnp.exp(scores - normaliser[here][..., None])
    out_grad = cotangent[here]
    weights_grad = product("BKGTD,BKSD->BKGTS", out_grad, value[:, :, :end])
    scores_grad = (weights * (weights_grad - inner[here]) * scale).astype(query.dtype)
    query_grad.append(product("BKGTS,BKSD->BKGTD", scores_grad, key[:, :, :end]))
    key_grad = key_grad.at[:, :, :end].add(product("BKGTS,BKGTD->BKSD", scores_grad, query[here]))
    value_grad = value_grad.at[:, :, :end].add(
      product("BKGTS,BKGTD->BKSD", weights.astype(value.dtype), out_grad)
    )
  query_grad = jnp.concatenate(query_grad, axis=3)
  return (
    query_grad.astype(query.dtype),
    key_grad.astype(key.dtype),
    value_grad.astype(value.dtype),
  )
