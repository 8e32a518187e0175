"""Attention against torch's, in float64, with a mask made query by query and key by key."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models import layouts
from tests.models.layouts import H, K
from tests.parity import relative_error
from vlalign_jax.models import attention, cudnn, splash, tiles


def expected(query, key, value, cotangent, mask):
  """Returns output and gradients by query, key and value, in torch and float64."""
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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tile", "shards"), [(5, 1), (23, 2), (8, 4), (5, 0), (512, 0)])
def test_output_and_gradients_equal_torch(tile, shards, masked, monkeypatch):
  inputs, layout = layouts.make_inputs(), layouts.make_layout() if masked else ()
  mask = None
  if masked:
    mask = layouts.make_mask(*layout)
    rows = tiles.Layout(*layout)
    index = np.arange(layouts.T)
    np.testing.assert_array_equal(tiles.visible(rows, rows, index, index), mask)
  computed = layouts.ours(inputs, layout, tile, shards, monkeypatch)
  for ours, theirs in zip(computed, expected(*inputs, mask), strict=True):
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize(("tile", "shards", "window"), [(4, 1, 5), (23, 2, 2), (4, 0, 7)])
def test_a_window_counts_positions(tile, shards, window, with_branches, monkeypatch):
  """Small tiles, because tiles without a visible key are skipped."""
  inputs, (segments, branches) = layouts.make_inputs(), layouts.make_layout()
  branches = branches if with_branches else np.zeros_like(branches)
  mask = layouts.make_mask(segments, branches, window)
  assert mask.sum() < layouts.make_mask(segments, branches).sum()
  layout = segments, branches if with_branches else None
  options = {"positions": layouts.make_positions(segments, branches), "window": window}
  computed = layouts.ours(inputs, layout, tile, shards, monkeypatch, **options)
  real = segments > 0  # padding has no positions
  for ours, theirs in zip(computed, expected(*inputs, mask), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


def test_more_keys_than_queries(monkeypatch):
  """As in a projector: every query sees all keys; tiles of queries and keys differ in size."""
  query, key, value, cotangent = layouts.make_inputs()
  inputs = query[:, :7], key, value, cotangent[:, :7]
  for tile, shards in ((5, 2), (6, 0)):
    computed = layouts.ours(inputs, (), tile, shards, monkeypatch)
    for ours, theirs in zip(computed, expected(*inputs, None), strict=True):
      assert relative_error(ours, theirs) < 1e-6


def test_bfloat16_has_only_its_rounding_error(monkeypatch):
  query, *others = layouts.make_inputs()
  # With large scores, an additional rounding of the query or of the scores is visible.
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in (8 * query, *others)]
  exact = expected(*(np.asarray(x, np.float64) for x in inputs), None)
  computed = layouts.ours(inputs, (), 8, 0, monkeypatch)
  assert {x.dtype for x in computed} == {jnp.dtype(jnp.bfloat16)}
  for ours, theirs in zip(computed, exact, strict=True):
    assert relative_error(ours, theirs) < 7e-3


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_the_tpu_kernel_equals_torch(window, with_branches):
  inputs, (segments, branches) = layouts.make_inputs(), layouts.make_layout()
  branches = branches if with_branches else np.zeros_like(branches)
  mask = layouts.make_mask(segments, branches, window)
  layout = tiles.Layout(
    segments,
    branches if with_branches else None,
    layouts.make_positions(segments, branches) if window else None,
  )
  attend = functools.partial(splash.attend, layout=layout, window=window, interpret=True)
  computed, real = layouts.with_gradients(attend, *inputs), segments > 0
  for ours, theirs in zip(computed, expected(*inputs, mask), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_the_mask_for_cudnn_equals_torch(window, with_branches):
  """jax.nn.dot_product_attention in plain JAX replaces the kernel. T is odd, so it is padded."""
  inputs, (segments, branches) = layouts.make_inputs(), layouts.make_layout()
  branches = branches if with_branches else np.zeros_like(branches)
  layout = tiles.Layout(
    segments,
    branches if with_branches else None,
    layouts.make_positions(segments, branches) if window else None,
  )
  attend = functools.partial(cudnn.attend, layout=layout, window=window, implementation="xla")
  computed, real = layouts.with_gradients(attend, *inputs), segments > 0
  mask = layouts.make_mask(segments, branches, window)
  for ours, theirs in zip(computed, expected(*inputs, mask), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("queries", [layouts.T, 7])
def test_the_tpu_kernel_without_rows_sees_everything(queries):
  query, key, value, cotangent = layouts.make_inputs()
  inputs = query[:, :queries], key, value, cotangent[:, :queries]
  attend = functools.partial(splash.attend, layout=None, interpret=True)
  computed = layouts.with_gradients(attend, *inputs)
  for ours, theirs in zip(computed, expected(*inputs, None), strict=True):
    assert relative_error(ours, theirs) < 1e-6


def test_the_tpu_kernel_of_long_rows_of_odd_length():
  """Several blocks, some of which no query sees; heads of 80; five answers."""
  rng, length = np.random.default_rng(1), 600
  query, cotangent = rng.normal(size=(2, 1, length, H, 80)).astype(np.float32)
  key, value = rng.normal(size=(2, 1, length, K, 80)).astype(np.float32)
  segments, branches = np.ones((2, 1, length), np.int32)
  segments[0, 560:] = 2
  branches[0] = np.repeat([0, 1, 2, 3, 4, 5, 0], [70, 60, 130, 200, 50, 50, 40])
  layout = tiles.Layout(segments, branches, None)
  index = np.arange(length)
  mask = np.asarray(tiles.visible(layout, layout, index, index))
  attend = functools.partial(splash.attend, layout=layout, interpret=True)
  inputs = query, key, value, cotangent
  computed = layouts.with_gradients(attend, *inputs)
  for ours, theirs in zip(computed, expected(*inputs, mask), strict=True):
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kernel", ["splash", "cudnn", "tiles"])
def test_pictures_with_heads_of_72(kernel):
  """As in SigLIP; the number of patches is odd, and the kernels pad it."""
  rng = np.random.default_rng(2)
  query, cotangent = rng.normal(size=(2, 1, 169, H, 72)).astype(np.float32)
  key, value = rng.normal(size=(2, 1, 169, K, 72)).astype(np.float32)
  attend = {
    "splash": functools.partial(splash.attend, layout=None, interpret=True),
    "cudnn": functools.partial(cudnn.attend, layout=None, implementation="xla"),
    "tiles": attention.attend,
  }[kernel]
  computed = layouts.with_gradients(attend, query, key, value, cotangent)
  for ours, theirs in zip(computed, expected(query, key, value, cotangent, None), strict=True):
    assert relative_error(ours, theirs) < 1e-6


def test_cudnn_without_rows_sees_everything():
  inputs = layouts.make_inputs()
  attend = functools.partial(cudnn.attend, layout=None, implementation="xla")
  computed = layouts.with_gradients(attend, *inputs)
  for ours, theirs in zip(computed, expected(*inputs, None), strict=True):
    assert relative_error(ours, theirs) < 1e-6
