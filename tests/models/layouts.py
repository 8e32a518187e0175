"""Rows for tests of attention, and their masks by the rule for one query and one key."""

import jax
import numpy as np

from vlalign_jax.models import attention, tiles

B, T, H, K, D = 4, 23, 6, 2, 10


def make_inputs(seed: int = 0):
  """Returns query, key, value and cotangent, float32."""
  rng = np.random.default_rng(seed)
  shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D), (B, T, H, D))
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def make_layout():
  """Returns segments and branches of rows with several examples, shared prompts and padding."""
  segments, branches = np.zeros((2, B, T), np.int32)
  segments[0] = 1  # one long example
  segments[1, :9], segments[1, 9:20] = 1, 2
  segments[2, :20], segments[2, 20:] = 1, 2
  branches[2, 4:9], branches[2, 9:11], branches[2, 11:20] = 1, 2, 3
  return segments, branches  # the last row is all padding


def make_positions(segments, branches):
  """Returns int32[B, T]; positions of a branch continue those of the prompt; 0 in padding."""
  positions = np.zeros((B, T), np.int32)
  for b, t in np.ndindex(B, T):
    in_prompt_or_branch = (branches[b, :t] == 0) | (branches[b, :t] == branches[b, t])
    if segments[b, t]:
      positions[b, t] = sum((segments[b, :t] == segments[b, t]) & in_prompt_or_branch)
  return positions


def make_images():
  """Returns image tokens for `make_layout`: first, after text, copied into branches, in padding."""
  images = np.zeros((B, T), bool)
  images[0, 6:11] = images[0, 15:18] = True
  images[1, :4] = images[1, 13:16] = True
  images[2, 2:5] = images[2, 9] = images[2, 11] = True
  images[3, 5:7] = True
  return images


def sees(segments, branches, q: int, k: int) -> bool:
  """Returns whether query q of a row sees key k."""
  if segments[q] != segments[k] or k > q:
    return False
  return branches[k] == 0 or branches[k] == branches[q]


def make_mask(segments, branches, window: int | None = None):
  """Returns bool[B, T, T] of the layout, with the positions of `make_positions`."""
  positions, mask = make_positions(segments, branches), np.zeros((B, T, T), bool)
  for b, q, k in np.ndindex(*mask.shape):
    near = window is None or positions[b, q] - positions[b, k] < window
    mask[b, q, k] = sees(segments[b], branches[b], q, k) and near
  return mask


def with_gradients(attend, query, key, value, cotangent):
  """Returns the output of `attend`, and gradients by query, key and value."""

  @jax.jit
  def compute(query, key, value, cotangent):
    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(cotangent)

  return compute(query, key, value, cotangent)


def ours(inputs, layout, tile, shards, monkeypatch, **options):
  """Returns output and gradients of our attention; shards=0: all rows at once, as on GPUs."""
  monkeypatch.setattr(tiles, "CPU_TILE", tile)
  monkeypatch.setattr(tiles, "TILE", tile)
  monkeypatch.setattr(attention, "row_blocks", lambda mesh: shards)
  return with_gradients(lambda *qkv: attention.attend(*qkv, *layout, **options), *inputs)
