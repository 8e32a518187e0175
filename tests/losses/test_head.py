"""Cross-entropies and log-probabilities of the output head, against torch in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlalign_jax.losses import head

B, T, D, V = 4, 12, 16, 40


def make_inputs(density: float, seed: int = 0):
  """Returns (hidden, kernel, targets, weights); weights are 0, or from 0.5 to 1.5."""
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
  """Returns (loss sum, its gradients by hidden and kernel, losses, greedy correctness [B, T])."""
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
  """Returns ((loss sum, gradients by hidden and kernel), token statistics)."""
  loss = functools.partial(head.cross_entropy_sum, shards=shards, chunk=chunk)
  gradient = jax.value_and_grad(lambda h, k: 3.0 * loss(h, k, targets, weights), (0, 1))
  statistics = head.token_statistics(hidden, kernel, targets, weights, shards=shards, chunk=chunk)
  return gradient(hidden, kernel), statistics


def test_in_float16_unlikely_tokens_have_gradients():
  """Gradients are made before they are multiplied by the loss scale."""
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

  exact, computed = gradient(hidden), gradient(hidden.astype(np.float16))
  close(computed[0], np.asarray(exact[0], np.float64), 5e-3)
  scale = np.abs(exact[1][:, :7]).max()
  for grad, expected_grad in zip(np.asarray(computed[1]).T, np.asarray(exact[1]).T, strict=True):
    if np.abs(expected_grad).max() > 1e-9 * scale:
      close(grad, expected_grad.astype(np.float64), 5e-2)


def close(computed, expected, tolerance):
  """Asserts an error within the tolerance relative to the expected norm, which may be 0."""
  difference = np.asarray(computed, np.float64) - expected
  assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
  ("shards", "chunk"),
  [(1, 5), (2, 7), (4, 3), (2, 128), (1, 48)],  # 5, 7 do not divide 48, 24; 128 is more than all
)
def test_sum_gradients_and_statistics_equal_torch(shards, chunk, density):
  inputs = make_inputs(density)
  total, hidden_grad, kernel_grad, losses, right = expected(*inputs)
  (total_loss, grads), statistics = both(*inputs, shards=shards, chunk=chunk)
  # The factor 3 makes a cotangent other than 1.
  close(total_loss, 3 * total, 1e-6)
  close(grads[0], 3 * hidden_grad, 1e-6)
  close(grads[1], 3 * kernel_grad, 1e-6)
  counts = inputs[3] != 0
  close(statistics[0], np.where(counts, losses, 0), 1e-6)
  np.testing.assert_array_equal(statistics[1], right & counts)
  assert 0 < right[counts].mean() < 1 if counts.any() else total_loss == 0


def test_bfloat16_hidden_states():
  hidden, kernel, targets, weights = make_inputs(0.5)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  # The kernel is used in the dtype of the hidden states; its gradient has the kernel's dtype.
  rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
  total, hidden_grad, kernel_grad, losses, _ = expected(hidden, rounded, targets, weights)
  (total_loss, grads), statistics = both(hidden, kernel, targets, weights, shards=2, chunk=7)
  assert grads[0].dtype == jnp.bfloat16
  assert grads[1].dtype == total_loss.dtype == statistics[0].dtype == jnp.float32
  close(total_loss, 3 * total, 1e-5)  # logits and statistics are float32
  close(statistics[0], np.where(weights != 0, losses, 0), 1e-5)
  close(grads[0], 3 * hidden_grad, 1e-2)
  close(grads[1], 3 * kernel_grad, 1e-2)


def test_the_gradient_of_a_frozen_kernel_is_not_computed():
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
  (total_loss, grads), _ = both(hidden * 1000, kernel, targets, weights, shards=1, chunk=16)
  close(total_loss, 3 * total, 1e-5)
  close(grads[0], 3 * hidden_grad, 1e-3)


def expected_by_token(hidden, kernel, targets, weights, cotangent):
  """Returns log-probabilities [B, T] (0 without weight), and gradients of cotangent * their sum."""
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

  logps, pull_back = jax.vjp(compute, hidden, kernel)
  return logps, *pull_back(cotangent)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("shards", "chunk"), [(1, 5), (2, 7), (4, 3), (2, 128), (1, 48)])
def test_log_probabilities_and_their_gradients_equal_torch(shards, chunk, density):
  inputs = make_inputs(density)
  # Of both signs, independent of the weights, and 0 for some tokens with a weight.
  rng = np.random.default_rng(1)
  cotangent = (rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.8)).astype(np.float32)
  computed = log_probabilities_and_gradients(*inputs, cotangent, shards=shards, chunk=chunk)
  for ours, expected_values in zip(computed, expected_by_token(*inputs, cotangent), strict=True):
    close(ours, expected_values, 1e-6)


def test_log_probabilities_of_bfloat16_hidden_states():
  hidden, kernel, targets, weights = make_inputs(0.5)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  cotangent = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
  rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
  expected_values = expected_by_token(hidden, rounded, targets, weights, cotangent)
  computed = log_probabilities_and_gradients(
    hidden, kernel, targets, weights, cotangent, shards=2, chunk=7
  )
  assert [x.dtype for x in computed] == [jnp.float32, jnp.bfloat16, jnp.float32]
  for ours, theirs, tolerance in zip(computed, expected_values, (1e-5, 1e-2, 1e-2), strict=True):
    close(ours, theirs, tolerance)


def test_log_probabilities_with_a_frozen_head_do_not_compute_its_gradient():
  hidden, kernel, targets, weights = make_inputs(0.5)

  def squares(h, k):
    logps = head.token_log_probabilities(h, k, targets, weights, shards=2, chunk=7)
    return jnp.sum(logps**2)

  logps, _, _ = expected_by_token(hidden, kernel, targets, weights, np.ones((B, T)))
  _, hidden_grad, kernel_grad = expected_by_token(hidden, kernel, targets, weights, 2 * logps)
  frozen = jax.jit(jax.grad(lambda h: squares(h, kernel)))
  close(frozen(hidden), hidden_grad, 1e-6)
  trained = jax.jit(jax.grad(lambda k: squares(hidden, k)))
  close(trained(kernel), kernel_grad, 1e-6)
  shape = f"f32[2,{D},{V}]"  # the kernel's gradient, one per shard
  assert shape not in frozen.lower(hidden).compile().as_text()
  assert shape in trained.lower(kernel).compile().as_text()
  # No array has the logits of all positions, forward or backward.
  assert f"[{B},{T},{V}]" not in trained.lower(kernel).compile().as_text()
