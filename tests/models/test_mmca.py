"""Multi-modal causal attention against its definition in float64, in NumPy loops."""

import functools

import numpy as np
import pytest
import torch

from tests.models import layouts
from tests.models.layouts import B, H, K, T
from tests.parity import relative_error
from vlalign_jax.models import cache, cudnn, splash, tiles
from vlalign_jax.models.stored import Stored


def softmax_mix(scores, values):
  """Returns softmax(scores) values; zeros without scores."""
  if not len(scores):
    return np.zeros(values.shape[1])
  weights = np.exp(scores - scores.max())
  return weights @ values / weights.sum()


def defined(query, key, value, mask, images):
  """Returns float64[B, T, H, D]: attended text plus attended images (image tokens: themselves)."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros(query.shape)
  for b, t, h in np.ndindex(*query.shape[:3]):
    keys, values = key[b, :, h * K // H], value[b, :, h * K // H]
    scores = keys @ query[b, t, h] / np.sqrt(query.shape[3])
    text = np.flatnonzero(mask[b, t] & ~images[b])
    shown = [t] if images[b, t] else np.flatnonzero(mask[b, t] & images[b])
    out[b, t, h] = softmax_mix(scores[text], values[text])
    out[b, t, h] += softmax_mix(scores[shown], values[shown])
  return out


def with_torch(query, key, value, cotangent, mask, images):
  """Returns output and gradients by query, key and value, in float64, by torch's autograd."""
  tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
  q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
  k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
  scores = q @ k.transpose(2, 3) / query.shape[3] ** 0.5
  itself = np.eye(T, dtype=bool) & images[:, None]
  out = 0
  for keys in (~images[:, None], images[:, None] & (itself | ~images[:, :, None])):
    seen = torch.tensor(mask & keys)[:, None]
    weights = torch.where(seen, scores, -torch.inf)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0).softmax(-1)
    out = out + torch.where(seen, weights, 0) @ v
  out = out.transpose(1, 2)
  out.backward(torch.tensor(cotangent, dtype=torch.float64))
  return out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)


def make_case(window: int | None = None, with_branches: bool = True):
  """Returns inputs, (segments, branches), options of `attend`, mask and images."""
  segments, branches = layouts.make_layout()
  branches = branches if with_branches else np.zeros_like(branches)
  images, mask = layouts.make_images(), layouts.make_mask(segments, branches, window)
  options = {"images": images, "window": window}
  if window:
    options["positions"] = layouts.make_positions(segments, branches)
  return layouts.make_inputs(), (segments, branches), options, mask, images


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("tile", "shards"), [(5, 1), (23, 2), (4, 0)])
def test_output_and_gradients_equal_the_definition(tile, shards, window, monkeypatch):
  inputs, layout, options, mask, images = make_case(window)
  expected = with_torch(*inputs, mask, images)
  defined_output = defined(*inputs[:3], mask, images)
  np.testing.assert_allclose(expected[0], defined_output, rtol=0, atol=1e-12)
  computed = layouts.ours(inputs, layout, tile, shards, monkeypatch, **options)
  for ours, theirs in zip(computed, expected, strict=True):
    assert relative_error(ours, theirs) < 1e-6
  # An image token before all text sees only itself.
  values = np.repeat(inputs[2][1, 0], H // K, axis=0)
  np.testing.assert_allclose(computed[0][1, 0], values, rtol=1e-6)


def test_scores_far_apart(monkeypatch):
  """Images have their own softmax: they count fully, however small their scores next to text."""
  inputs, layout, options, mask, images = make_case()
  inputs[1][images] *= 0.01
  inputs[1][~images] *= 200.0
  computed = layouts.ours(inputs, layout, 5, 1, monkeypatch, **options)
  for ours, theirs in zip(computed, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours, theirs) < 1e-5  # scores of 1,000 have fewer digits left


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_the_tpu_kernel(window, with_branches):
  inputs, (segments, branches), options, mask, images = make_case(window, with_branches)
  branches = branches if with_branches else None
  row_layout = tiles.Layout(segments, branches, options.get("positions"), images)
  attend = functools.partial(splash.attend, layout=row_layout, window=window, interpret=True)
  computed, real = layouts.with_gradients(attend, *inputs), segments > 0
  for ours, theirs in zip(computed, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_for_cudnn(window):
  """jax.nn.dot_product_attention in plain JAX replaces the kernel."""
  inputs, layout, options, mask, images = make_case(window)
  row_layout = tiles.Layout(*layout, options.get("positions"), images)
  attend = functools.partial(cudnn.attend, layout=row_layout, window=window, implementation="xla")
  computed, real = layouts.with_gradients(attend, *inputs), layout[0] > 0
  for ours, theirs in zip(computed, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_images", [True, False])
def test_the_newest_token_and_a_cache(window, with_images):
  """Two samples of prompts of 0 to 9 tokens, compared sample by sample.

  The samples have 4, 0, 6 and 2 tokens; after 14 that were appended to 6 places, the newest of them
  is in the second place.
  """
  N, S, M, D = 2, 9, 6, layouts.D
  steps, clock = np.array([4, 0, 6, 2]), 14
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  lengths, images = np.array([9, 5, 3, 0]), rng.random((B, S)) < 0.5
  images[1] = False
  shapes = [(B, K, S, D)] * 2 + [(B, K, N, M, D)] * 2
  kv_cache = cache.Cache(*(Stored(draw(*shape)) for shape in shapes))
  query, key, value = draw(B, N, H, D), draw(B, N, K, D), draw(B, N, K, D)
  options = {"window": window, "images": (images,) if with_images else None}
  computed = cache.attend(query, key, value, (kv_cache,), lengths, steps, clock, **options)
  for b, n in np.ndindex(B, N):
    step = steps[b]
    places = np.arange(clock - step, clock) % M
    keys, values = (
      np.concatenate(
        [prompt[b, :, : lengths[b]], earlier[b, :, n, places].swapaxes(0, 1), new[b, n, :, None]], 1
      )
      for prompt, earlier, new in (
        (kv_cache.prompt_keys.numbers, kv_cache.keys.numbers, key),
        (kv_cache.prompt_values.numbers, kv_cache.values.numbers, value),
      )
    )
    total = lengths[b] + step + 1
    seen = np.arange(total) > total - 1 - (window or total)
    is_image = np.concatenate([images[b, : lengths[b]], np.zeros(step + 1, bool)]) & with_images
    for h in range(H):
      scores = keys[h * K // H] @ query[b, n, h].astype(np.float64) / np.sqrt(D)
      expected = sum(
        softmax_mix(scores[seen & of_class], values[h * K // H][seen & of_class])
        for of_class in (is_image, ~is_image)
      )
      assert relative_error(computed[b, n, h], expected) < 1e-6
