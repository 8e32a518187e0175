"""Multi-modal causal attention against its definition in float64, in NumPy's loops."""

import functools

import numpy as np
import pytest
import torch

from tests.models import layouts
from tests.models.layouts import B, H, K, T
from tests.parity import relative_error
from vlalign_jax.models import cache, cudnn, splash, tiles


def softmax_mix(scores, values):
  """softmax(scores) values; zero over nothing."""
  if not len(scores):
    return np.zeros(values.shape[1])
  weights = np.exp(scores - scores.max())
  return weights @ values / weights.sum()


def defined(query, key, value, mask, images):
  """float64[B, T, H, D]: the text that a query sees, and the images, or itself if it is one."""
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
  """Output and gradients by query, key and value, in float64, by torch's autograd."""
  tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
  q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
  k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
  scores = q @ k.transpose(2, 3) / query.shape[3] ** 0.5
  own = np.eye(T, dtype=bool) & images[:, None]
  out = 0
  for keys in (~images[:, None], images[:, None] & (own | ~images[:, :, None])):
    seen = torch.tensor(mask & keys)[:, None]
    weights = torch.where(seen, scores, -torch.inf)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0).softmax(-1)
    out = out + torch.where(seen, weights, 0) @ v
  out = out.transpose(1, 2)
  out.backward(torch.tensor(cotangent, dtype=torch.float64))
  return out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)


def make_case(window: int | None = None, with_branches: bool = True):
  """inputs, (segments, branches), options of `attend`, mask and images."""
  segments, branches = layouts.make_layout()
  branches = branches if with_branches else np.zeros_like(branches)
  images, mask = layouts.make_images(), layouts.make_mask(segments, branches, window)
  options = {"images": images, "window": window}
  if window:
    options["positions"] = layouts.make_positions(segments, branches)
  return layouts.make_inputs(), (segments, branches), options, mask, images


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("block", "shards"), [(5, 1), (23, 2), (4, 0)])
def test_output_and_gradients_equal_the_definition(block, shards, window, monkeypatch):
  inputs, layout, options, mask, images = make_case(window)
  expected = with_torch(*inputs, mask, images)
  by_definition = defined(*inputs[:3], mask, images)
  np.testing.assert_allclose(expected[0], by_definition, rtol=0, atol=1e-12)
  found = layouts.ours(inputs, layout, block, shards, monkeypatch, **options)
  for ours, theirs in zip(found, expected, strict=True):
    assert relative_error(ours, theirs) < 1e-6
  # A picture before all text: of text there is nothing to see, of images itself.
  np.testing.assert_allclose(found[0][1, 0], np.repeat(inputs[2][1, 0], H // K, axis=0), rtol=1e-6)


def test_scores_far_apart(monkeypatch):
  """A softmax of its own: what would be nothing beside the text counts in full."""
  inputs, layout, options, mask, images = make_case()
  inputs[1][images] *= 0.01
  inputs[1][~images] *= 200.0
  found = layouts.ours(inputs, layout, 5, 1, monkeypatch, **options)
  for ours, theirs in zip(found, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours, theirs) < 1e-5  # scores of 1,000 have fewer digits left


@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_of_tpus(window):
  inputs, (segments, _), options, mask, images = make_case(window, with_branches=False)
  attend = functools.partial(
    splash.attend, segments=segments, images=images, window=window, mesh=None, interpret=True
  )
  found, real = layouts.with_gradients(attend, *inputs), segments > 0
  for ours, theirs in zip(found, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_for_cudnn(window):
  """jax.nn.dot_product_attention in plain JAX stands in for the kernel."""
  inputs, layout, options, mask, images = make_case(window)
  rows = tiles.Layout(*layout, options.get("positions"), images)
  attend = functools.partial(cudnn.attend, layout=rows, window=window, implementation="xla")
  attended, real = layouts.with_gradients(attend, *inputs), layout[0] > 0
  for ours, theirs in zip(attended, with_torch(*inputs, mask, images), strict=True):
    assert relative_error(ours[real], theirs[real]) < 1e-6


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_images", [True, False])
def test_the_newest_token_and_a_cache(window, with_images):
  """Two samples of prompts of 0 to 9 tokens, each by itself: prompt, answer, newest token."""
  N, S, M, step, D = 2, 9, 6, 4, layouts.D
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  lengths, images = np.array([9, 5, 3, 0]), rng.random((B, S)) < 0.5
  images[1] = False
  held = cache.Cache(draw(B, K, S, D), draw(B, K, S, D), draw(B, K, N, M, D), draw(B, K, N, M, D))
  query, key, value = draw(B, N, H, D), draw(B, N, K, D), draw(B, N, K, D)
  given = {"window": window, "images": images if with_images else None}
  found = cache.attend(query, key, value, held, lengths, step, **given)
  for b, n in np.ndindex(B, N):
    keys, values = (
      np.concatenate([of_prompt[b, :, : lengths[b]], own[b, :, n, :step], newest[b, n, :, None]], 1)
      for of_prompt, own, newest in (
        (held.prompt_keys, held.keys, key),
        (held.prompt_values, held.values, value),
      )
    )
    total = lengths[b] + step + 1
    seen = np.arange(total) > total - 1 - (window or total)
    shown = np.concatenate([images[b, : lengths[b]], np.zeros(step + 1, bool)]) & with_images
    for h in range(H):
      scores = keys[h * K // H] @ query[b, n, h].astype(np.float64) / np.sqrt(D)
      expected = sum(
        softmax_mix(scores[seen & of_class], values[h * K // H][seen & of_class])
        for of_class in (shown, ~shown)
      )
      assert relative_error(found[b, n, h], expected) < 1e-6
