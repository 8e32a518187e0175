"""The linear map of all models against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from vlalign_jax.models import linear


def test_linear_and_its_gradients_are_torchs():
  ours = linear.Linear(6, 4, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x, weights = (rng.normal(size=(2, 3, n)).astype(np.float32) for n in (6, 4))
  ours.bias[...] = jnp.asarray(rng.normal(size=4), jnp.float32)

  def loss(module, x):
    return jnp.sum(weights * jnp.tanh(module(x)))

  (by_module, by_x) = nnx.grad(loss, argnums=(0, 1))(ours, x)
  theirs = torch.nn.Linear(6, 4)
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(np.asarray(ours.kernel[...]).T))
    theirs.bias.copy_(torch.tensor(np.asarray(ours.bias[...])))
  x = torch.tensor(x, requires_grad=True)
  total = (torch.tensor(weights) * torch.tanh(theirs(x))).sum()
  total.backward()
  np.testing.assert_allclose(loss(ours, x.detach().numpy()), total.item(), rtol=1e-5)
  for found, wanted in (
    (by_module["kernel"][...].T, theirs.weight.grad),
    (by_module["bias"][...], theirs.bias.grad),
    (by_x, x.grad),
  ):
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(("argnums", "products"), [(0, 8), (1, 6)], ids=["trained", "frozen"])
def test_gradient_of_a_frozen_kernel_is_not_computed(argnums, products):
  """Of three layers; the first one has no gradient by its input where only kernels are trained."""
  layers, rows, width = 3, 64, 32

  def loss(kernels, x):
    layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(linear.product(x, kernel)), None))
    return jnp.sum(jax.lax.scan(layer, x, kernels, unroll=layers)[0])

  shapes = jnp.zeros((layers, width, width)), jnp.zeros((rows, width))
  program = jax.jit(jax.grad(loss, argnums)).lower(*shapes).compile()
  wanted = products * 2 * rows * width**2  # CPUs keep what would be computed again
  assert program.cost_analysis()["flops"] == pytest.approx(wanted, rel=0.05)
