"""Cross-entropy without logits of the whole batch, against torch in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlalign_jax.losses import head

B, T, D, V = 4, 12, 16, 40


def make_inputs(density: float, seed: int = 0):
  """hidden, kernel, targets, weights; the weights that count are from 0.5 to 1.5."""
  rng = np.random.default_rng(seed)
  weights = rng.uniform(0.5, 1.5, (B, T)) * (rng.random((B, T)) < density)
  hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V)) / 2
  guessed = rng.random((B, T)) < 0.5
  targets = np.where(guessed, np.argmax(hidden @ kernel, axis=-1), rng.integers(0, V, (B, T)))
  return (
    hidden.astype(np.float32),
    kernel.astype(np.float32),
    targets.astype(np.int32),
    weights.astype(np.float32),
  )


def expected(hidden, kernel, targets, weights):
  """(loss sum, its gradient by hidden, by kernel, losses [B, T], greedy correctness [B, T])."""
  hidden = torch.tensor(np.asarray(hidden, np.float64), requires_grad=True)
  kernel = torch.tensor(np.asarray(kernel, np.float64), requires_grad=True)
  logits = hidden @ kernel
  losses = torch.nn.functional.cross_entropy(
    logits.reshape(-1, V), torch.tensor(targets).long().reshape(-1), reduction="none"
  ).reshape(B, T)
  total = (losses * torch.tensor(weights, dtype=torch.float64)).sum()
  total.backward()
  right = logits.detach().argmax(-1).numpy() == targets
  return total.item(), hidden.grad.numpy(), kernel.grad.numpy(), losses.detach().numpy(), right


@functools.partial(jax.jit, static_argnames=("shards", "chunk"))
def both(hidden, kernel, targets, weights, shards, chunk):
  """((loss sum, gradients by hidden and kernel), token statistics)."""
  loss = functools.partial(head.cross_entropy_sum, shards=shards, chunk=chunk)
  gradient = jax.value_and_grad(lambda h, k: 3.0 * loss(h, k, targets, weights), (0, 1))
  statistics = head.token_statistics(hidden, kernel, targets, weights, shards=shards, chunk=chunk)
  return gradient(hidden, kernel), statistics


def test_in_float16_unlikely_tokens_have_gradients():
  """They are made before the factor of the loss comes to them."""
  hidden, kernel, _, weights = make_inputs(1.0)
  kernel[:, 7:] *= 0.2
  kernel[0, 7:] -= 0.08  # less likely than float16's smallest number
  hidden[..., 0] = 30
  hidden = hidden.astype(np.float16).astype(np.float32)
  kernel = kernel.astype(np.float16).astype(np.float32)
  targets = np.tile(np.arange(T) % 7, (B, 1)).astype(np.int32)

  def gradient(hidden):
    loss = lambda h, k: 64 * head.cross_entropy_sum(h, k, targets, weights)  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)

  exact, found = gradient(hidden), gradient(hidden.astype(np.float16))
  close(found[0], np.asarray(exact[0], np.float64), 5e-3)
  likely = np.abs(exact[1][:, :7]).max()
  for of_token, wanted in zip(np.asarray(found[1]).T, np.asarray(exact[1]).T, strict=True):
    if np.abs(wanted).max() > 1e-9 * likely:
      close(of_token, wanted.astype(np.float64), 5e-2)


def close(found, wanted, tolerance):
  """Within the tolerance relative to the norm of what is wanted, which may be all 0."""
  difference = np.asarray(found, np.float64) - wanted
  assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
  ("shards", "chunk"),
  [(1, 5), (2, 7), (4, 3), (2, 128), (1, 48)],  # 5, 7 do not divide 48, 24; 128 is more than all
)
def test_sum_gradients_and_statistics_equal_torch(shards, chunk, density):
  inputs = make_inputs(density)
  total, hidden_grad, kernel_grad, losses, right = expected(*inputs)
  (found, grads), statistics = both(*inputs, shards=shards, chunk=chunk)
  # The factor 3 is there so that an incoming cotangent other than 1 is seen.
  close(found, 3 * total, 1e-6)
  close(grads[0], 3 * hidden_grad, 1e-6)
  close(grads[1], 3 * kernel_grad, 1e-6)
  counts = inputs[3] != 0
  close(statistics[0], np.where(counts, losses, 0), 1e-6)
  np.testing.assert_array_equal(statistics[1], right & counts)
  assert 0 < right[counts].mean() < 1 if counts.any() else found == 0


def test_bfloat16_hidden_states():
  hidden, kernel, targets, weights = make_inputs(0.5)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  # The kernel is used in the dtype of the hidden states, and its gradient comes in its own.
  rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
  total, hidden_grad, kernel_grad, losses, _ = expected(hidden, rounded, targets, weights)
  (found, grads), statistics = both(hidden, kernel, targets, weights, shards=2, chunk=7)
  assert grads[0].dtype == jnp.bfloat16
  assert grads[1].dtype == found.dtype == statistics[0].dtype == jnp.float32
  close(found, 3 * total, 1e-5)  # logits and statistics are float32
  close(statistics[0], np.where(weights != 0, losses, 0), 1e-5)
  close(grads[0], 3 * hidden_grad, 1e-2)
  close(grads[1], 3 * kernel_grad, 1e-2)


def test_a_frozen_kernel_gets_no_gradient_and_costs_none():
  hidden, kernel, targets, weights = make_inputs(0.5)
  _, hidden_grad, _, _, _ = expected(hidden, kernel, targets, weights)
  loss = functools.partial(head.cross_entropy_sum, shards=2, chunk=7)
  compute = jax.jit(jax.grad(lambda h: loss(h, kernel, targets, weights)))
  close(compute(hidden), hidden_grad, 1e-6)
  shape = f"f32[2,{D},{V}]"  # the kernel's gradient, one per shard
  assert shape not in compute.lower(hidden).compile().as_text()
  with_kernel = jax.jit(jax.grad(lambda k: loss(hidden, k, targets, weights)))
  assert shape in with_kernel.lower(kernel).compile().as_text()


def test_huge_logits_stay_finite():
  hidden, kernel, targets, weights = make_inputs(0.5)
  total, hidden_grad, _, _, _ = expected(hidden * 1000, kernel, targets, weights)
  (found, grads), _ = both(hidden * 1000, kernel, targets, weights, shards=1, chunk=16)
  close(found, 3 * total, 1e-5)
  close(grads[0], 3 * hidden_grad, 1e-3)


def expected_by_token(hidden, kernel, targets, weights, cotangent):
  """Log-probabilities [B, T], gradients of their sum weighted by `cotangent`; 0 without weight."""
  hidden = torch.tensor(np.asarray(hidden, np.float64), requires_grad=True)
  kernel = torch.tensor(np.asarray(kernel, np.float64), requires_grad=True)
  every = torch.log_softmax(hidden @ kernel, dim=-1)
  chosen = every.gather(-1, torch.tensor(targets).long()[:, :, None])[:, :, 0]
  chosen = chosen * torch.tensor(weights != 0)
  (chosen * torch.tensor(np.asarray(cotangent, np.float64))).sum().backward()
  return chosen.detach().numpy(), hidden.grad.numpy(), kernel.grad.numpy()


@functools.partial(jax.jit, static_argnames=("shards", "chunk"))
def log_probabilities_and_gradients(hidden, kernel, targets, weights, cotangent, shards, chunk):
  def compute(h, k):
    return head.token_log_probabilities(h, k, targets, weights, shards=shards, chunk=chunk)

  found, pull_back = jax.vjp(compute, hidden, kernel)
  return found, *pull_back(cotangent)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("shards", "chunk"), [(1, 5), (2, 7), (4, 3), (2, 128), (1, 48)])
def test_log_probabilities_and_their_gradients_equal_torch(shards, chunk, density):
  inputs = make_inputs(density)
  # Of both signs, without regard to the weights, and 0 for some tokens that have one.
  rng = np.random.default_rng(1)
  cotangent = (rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.8)).astype(np.float32)
  found = log_probabilities_and_gradients(*inputs, cotangent, shards=shards, chunk=chunk)
  for ours, wanted in zip(found, expected_by_token(*inputs, cotangent), strict=True):
    close(ours, wanted, 1e-6)


def test_log_probabilities_of_bfloat16_hidden_states():
  hidden, kernel, targets, weights = make_inputs(0.5)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  cotangent = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
  rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
  wanted = expected_by_token(hidden, rounded, targets, weights, cotangent)
  found = log_probabilities_and_gradients(
    hidden, kernel, targets, weights, cotangent, shards=2, chunk=7
  )
  assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.float32]
  for ours, theirs, tolerance in zip(found, wanted, (1e-5, 1e-2, 1e-2), strict=True):
    close(ours, theirs, tolerance)


def test_log_probabilities_of_a_frozen_head_cost_no_gradient_of_it():
  hidden, kernel, targets, weights = make_inputs(0.5)

  def squares(h, k):
    found = head.token_log_probabilities(h, k, targets, weights, shards=2, chunk=7)
    return jnp.sum(found**2)

  logps, _, _ = expected_by_token(hidden, kernel, targets, weights, np.ones((B, T)))
  _, hidden_grad, kernel_grad = expected_by_token(hidden, kernel, targets, weights, 2 * logps)
  frozen = jax.jit(jax.grad(lambda h: squares(h, kernel)))
  close(frozen(hidden), hidden_grad, 1e-6)
  trained = jax.jit(jax.grad(lambda k: squares(hidden, k)))
  close(trained(kernel), kernel_grad, 1e-6)
  shape = f"f32[2,{D},{V}]"  # the kernel's gradient, one per shard
  assert shape not in frozen.lower(hidden).compile().as_text()
  assert shape in trained.lower(kernel).compile().as_text()
  # Nothing holds logits of all positions at once, forward or backward.
  assert f"[{B},{T},{V}]" not in trained.lower(kernel).compile().as_text()
