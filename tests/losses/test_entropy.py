"""Log-probabilities with entropies and their gradients, against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.losses.test_head import V, close, make_inputs
from vlalign_jax.losses import entropy, head, support


def expected(hidden, kernel, targets, weights, by_log, by_entropy, left_out=None):
  """Returns log-probabilities, entropies, and gradients by hidden and kernel of a weighted sum."""
  hidden, kernel = (
    torch.tensor(x.astype(np.float64), requires_grad=True) for x in (hidden, kernel)
  )
  logits = hidden @ kernel
  if left_out is not None:
    logits = logits.masked_fill(torch.tensor(left_out), -1e9)
  policy = torch.distributions.Categorical(logits=logits)
  counts = torch.tensor(weights != 0)
  logps = torch.where(counts, policy.log_prob(torch.tensor(targets)), 0.0)
  entropies = policy.entropy() * counts
  total = (logps * torch.tensor(by_log)).sum() + (entropies * torch.tensor(by_entropy)).sum()
  total.backward()
  return [x.detach().numpy() for x in (logps, entropies, hidden.grad, kernel.grad)]


@pytest.mark.parametrize(("shards", "chunk"), [(1, 5), (2, 64)])
def test_values_and_gradients_equal_torch(shards, chunk):
  hidden, kernel, targets, weights = make_inputs(0.6)
  assert targets.max() < V
  rng = np.random.default_rng(1)
  by_log, by_entropy = rng.normal(size=(2, *targets.shape))
  by_log[::2] = 0  # there, the entropy alone has a gradient

  def total(hidden, kernel):
    values = entropy.token_log_probabilities_and_entropies(
      hidden, kernel, targets, weights, shards=shards, chunk=chunk
    )
    return jnp.sum(values[0] * by_log) + jnp.sum(values[1] * by_entropy), values

  (_, values), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)
  exact = expected(hidden, kernel, targets, weights, by_log, by_entropy)
  for one, other in zip((*values, *gradients), exact, strict=True):
    close(one, other, 1e-5)


@pytest.mark.parametrize("function", ["alone", "with entropies"])
def test_forbidden_tokens_have_no_probability(function):
  """Values and gradients, with tokens that are forbidden always or only in early positions."""
  hidden, kernel, targets, weights = make_inputs(0.6)
  rng = np.random.default_rng(2)
  always, at_first = np.zeros((2, V), bool)
  always[[0, 5]] = at_first[[1, 2, V - 1]] = True
  early = rng.random(targets.shape) < 0.5
  left_out = always | (early[..., None] & at_first)
  # Learned targets are not forbidden; other targets are 0, which is.
  allowed = np.argsort(rng.random(left_out.shape) + 2 * left_out, axis=-1)[..., 0]
  targets = np.where(weights != 0, allowed, 0).astype(np.int32)
  by_log, by_entropy = rng.normal(size=(2, *targets.shape))
  limits = support.Support(jnp.array(always), jnp.array(at_first), jnp.array(early))
  options = {"shards": 2, "chunk": 5, "support": limits}

  def total(hidden, kernel):
    if function == "alone":
      values = (head.token_log_probabilities(hidden, kernel, targets, weights, **options),)
    else:
      values = entropy.token_log_probabilities_and_entropies(
        hidden, kernel, targets, weights, **options
      )
    return sum(jnp.sum(x * by) for x, by in zip(values, (by_log, by_entropy), strict=False)), values

  (_, values), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)
  if function == "alone":
    by_entropy = np.zeros(targets.shape)
  exact = expected(hidden, kernel, targets, weights, by_log, by_entropy, left_out)
  for one, other in zip((*values, *gradients), (*exact[: len(values)], *exact[2:]), strict=True):
    close(one, other, 1e-5)


def test_a_loss_without_entropies_has_the_gradients_of_log_probabilities():
  hidden, kernel, targets, weights = make_inputs(0.6)
  by_log = np.random.default_rng(1).normal(size=targets.shape)

  def total(hidden, kernel):
    values = entropy.token_log_probabilities_and_entropies(hidden, kernel, targets, weights)
    return jnp.sum(values[0] * by_log)

  gradients = jax.jit(jax.grad(total, (0, 1)))(hidden, kernel)
  exact = expected(hidden, kernel, targets, weights, by_log, np.zeros(targets.shape))
  for one, other in zip(gradients, exact[2:], strict=True):
    close(one, other, 1e-5)
