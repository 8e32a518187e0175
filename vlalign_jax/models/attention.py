"""Attention over rows that hold several examples, each with a shared prompt and several answers.

One rule covers padding, packing and shared prompts: query q sees key k iff both are of the same
segment, k belongs to the prompt (branch 0) or to q's own branch, and k is not after q.
"""

import functools

import jax
import jax.numpy as jnp

# Longer rows are worked through in blocks of this many queries, so that no [B, H, T, T] array
# is held; keys after a block are not even computed.
QUERY_BLOCK = 512


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


def attend(query, key, value, mask=None):
  """Softmax attention with grouped key/value heads and float32 statistics.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, S, K, D] with H a multiple of K; head h reads key head h // (H / K).
    mask: bool[B, T, S], true where a query sees a key; None: everything is seen. A query that
      sees nothing gets the mean of the values.

  Returns:
    float[B, T, H, D] in the query's dtype.
  """
  B, T, H, D = query.shape
  K = key.shape[2]
  query = query.reshape(B, T, K, H // K, D)
  scores = jnp.einsum("BTKGD,BSKD->BKGTS", query, key, preferred_element_type=jnp.float32)
  scores *= D**-0.5
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("BKGTS,BSKD->BTKGD", weights, value).reshape(B, T, H, D)


def attend_rows(query, key, value, segments, branches):
  """Self-attention within rows, by the rule above.

  Args:
    query: float[B, T, H, D].
    key, value: float[B, T, K, D].
    segments, branches: int32[B, T].

  Returns:
    float[B, T, H, D].
  """
  T = query.shape[1]
  if T <= QUERY_BLOCK:
    return attend(query, key, value, visible(segments, branches, segments, branches))

  # A block's scores are computed again in the backward pass rather than kept.
  @functools.partial(jax.checkpoint, static_argnums=(5,))
  def block(query, key, value, segments, branches, start):
    stop = start + query.shape[1]
    mask = visible(segments[:, start:], branches[:, start:], segments, branches, start)
    return attend(query, key, value, mask[:, : stop - start])

  blocks = []
  for start in range(0, T, QUERY_BLOCK):
    stop = min(start + QUERY_BLOCK, T)
    blocks.append(
      block(
        query[:, start:stop], key[:, :stop], value[:, :stop],
        segments[:, :stop], branches[:, :stop], start,
      )
    )  # fmt: skip
  return jnp.concatenate(blocks, axis=1)
