"""On CPUs the layers of 16-bit models are cast one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlalign_jax.models import stack

LAYERS, WIDTH = 8, 256


def _run(params, x, in_loop):
  scanned, select_layer = stack.in_loop(params, None) if in_loop else (params, lambda layer: layer)

  def body(x, scanned):
    return jnp.tanh(x @ select_layer(scanned)["kernel"]), None

  return jax.lax.scan(body, x, scanned)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_memory_and_gradients(dtype):
  kernel = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) * WIDTH**-0.5
  params = {"kernel": kernel.astype(dtype)}
  x = jax.random.normal(jax.random.key(1), (4, WIDTH), dtype)
  run = jax.jit(_run, static_argnums=2)
  temporary = run.lower(params, x, True).compile().memory_analysis().temp_size_in_bytes
  assert temporary < 2 * WIDTH**2 * 4  # two layers in float32; the stack has 8
  np.testing.assert_array_equal(run(params, x, True), run(params, x, False))

  def loss(params, x, in_loop):
    return jnp.sum(_run(params, x, in_loop).astype(jnp.float32) ** 2)

  grads, expected = (
    jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(params, x, case)
    for case in (True, False)
  )
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)
  assert np.any(np.asarray(grads[0]["kernel"], np.float32))
