"""Attention in blocks against torch's, in float64, with a mask made by reading the rule aloud."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.reference import relative_error
from vlalign_jax.models import attention, splash, tiles

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


def sees(segments, branches, q: int, k: int) -> bool:
  """The rule for one query and one key of a row."""
  if segments[q] != segments[k] or k > q:
    return False
  return branches[k] == 0 or branches[k] == branches[q]


def expected(query, key, value, cotangent, mask):
  """Output and gradients by query, key and value, in torch and float64."""
  tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
  q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
  out = torch.nn.functional.scaled_dot_product_attention(
    q,
    k.repeat_interleave(H // K, dim=1),
    v.repeat_interleave(H // K, dim=1),
    attn_mask=None if mask is None else torch.tensor(mask)[:, None],
  ).transpose(1, 2)
  out.backward(torch.tensor(cotangent, dtype=torch.float64))
  return out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)


def with_gradients(attend, query, key, value, cotangent):
  """Output of `attend` and gradients by query, key and value."""

  @jax.jit
  def compute(query, key, value, cotangent):
    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(cotangent)

  return compute(query, key, value, cotangent)


def ours(inputs, layout, block, shards, monkeypatch):
  """As `expected`; shards 0 is what accelerators run: all rows at once."""
  monkeypatch.setattr(tiles, "CPU_TILE", block)
  monkeypatch.setattr(tiles, "TILE", block)
  monkeypatch.setattr(attention, "row_blocks", lambda mesh: shards)
  return with_gradients(lambda *qkv: attention.attend(*qkv, *layout), *inputs)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("block", "shards"), [(5, 1), (23, 2), (8, 4), (5, 0), (512, 0)])
def test_output_and_gradients_equal_torch(block, shards, masked, monkeypatch):
  inputs, layout = make_inputs(), make_layout() if masked else ()
  mask = None
  if masked:
    mask = np.array(
      [
        [[sees(s, b, q, k) for k in range(T)] for q in range(T)]
        for s, b in zip(*layout, strict=True)
      ]
    )
    whole = tiles.Layout(*layout)
    index = np.arange(T)
    np.testing.assert_array_equal(tiles.visible(whole, whole, index, index), mask)
  found = ours(inputs, layout, block, shards, monkeypatch)
  for ours_, theirs in zip(found, expected(*inputs, mask), strict=True):
    assert relative_error(ours_, theirs) < 1e-6


def test_bfloat16_is_as_near_as_its_rounding(monkeypatch):
  query, *others = make_inputs()
  # Large scores show a rounding of the query or of the scores best.
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in (8 * query, *others)]
  exact = expected(*(np.asarray(x, np.float64) for x in inputs), None)
  found = ours(inputs, (), 8, 0, monkeypatch)
  assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
  for ours_, theirs in zip(found, exact, strict=True):
    assert relative_error(ours_, theirs) < 7e-3


def test_the_kernel_of_tpus_equals_torch():
  inputs, (segments, _) = make_inputs(), make_layout()
  no_branches = np.zeros(T, np.int32)
  mask = np.array(
    [[[sees(s, no_branches, q, k) for k in range(T)] for q in range(T)] for s in segments]
  )
  attend = functools.partial(splash.attend, segments=segments, mesh=None, interpret=True)
  found = with_gradients(attend, *inputs)
  for ours_, theirs in zip(found, expected(*inputs, mask), strict=True):
    assert relative_error(ours_, theirs) < 1e-6
