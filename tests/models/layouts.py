"""Rows for tests of attention, and who sees whom in them by reading the rule aloud."""

import jax
import numpy as np

from vlalign_jax.models import attention, tiles

B, T, H, K, D = 4, 23, 6, 2, 10


def make_inputs(seed: int = 0):
  """query, key, value, cotangent: float32."""
  rng = np.random.default_rng(seed)
  shapes = ((B, T, H, D), (B, T, K, D), (B, T, K, D), (B, T, H, D))
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def make_layout():
  """segments, branches of rows with several examples, shared prompts and padding."""
  segments, branches = np.zeros((2, B, T), np.int32)
  segments[0] = 1  # one long example
  segments[1, :9], segments[1, 9:20] = 1, 2
  segments[2, :20], segments[2, 20:] = 1, 2
  branches[2, 4:9], branches[2, 9:11], branches[2, 11:20] = 1, 2, 3
  return segments, branches  # the last row only pads


def make_positions(segments, branches):
  """int32[B, T]: branches go on where the prompt ends; 0 in padding."""
  positions = np.zeros((B, T), np.int32)
  for b, t in np.ndindex(B, T):
    of_prompt = (segments[b, :t] == segments[b, t]) & (branches[b, :t] == 0)
    own = (segments[b, :t] == segments[b, t]) & (branches[b, :t] == branches[b, t])
    if segments[b, t]:
      positions[b, t] = sum(of_prompt | own)
  return positions


def make_images():
  """Image tokens of `make_layout`: first of all, after text, copied into branches, as padding."""
  images = np.zeros((B, T), bool)
  images[0, 6:11] = images[0, 15:18] = True
  images[1, :4] = images[1, 13:16] = True
  images[2, 2:5] = images[2, 9] = images[2, 11] = True
  images[3, 5:7] = True
  return images


def sees(segments, branches, q: int, k: int) -> bool:
  """The rule for one query and one key of a row."""
  if segments[q] != segments[k] or k > q:
    return False
  return branches[k] == 0 or branches[k] == branches[q]


def make_mask(segments, branches, window: int | None = None):
  """bool[B, T, T] of the layout, with the positions of `make_positions`."""
  positions, mask = make_positions(segments, branches), np.zeros((B, T, T), bool)
  for b, q, k in np.ndindex(*mask.shape):
    near = window is None or positions[b, q] - positions[b, k] < window
    mask[b, q, k] = sees(segments[b], branches[b], q, k) and near
  return mask


def with_gradients(attend, query, key, value, cotangent):
  """Output of `attend` and gradients by query, key and value."""

  @jax.jit
  def compute(query, key, value, cotangent):
    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(cotangent)

  return compute(query, key, value, cotangent)


def ours(inputs, layout, block, shards, monkeypatch, **options):
  """Output and gradients of our attention; shards 0 is what accelerators run: all rows at once."""
  monkeypatch.setattr(tiles, "CPU_TILE", block)
  monkeypatch.setattr(tiles, "TILE", block)
  monkeypatch.setattr(attention, "row_blocks", lambda mesh: shards)
  return with_gradients(lambda *qkv: attention.attend(*qkv, *layout, **options), *inputs)
