"""Keys and values in int8: the error of each vector, and what attention over them computes."""

import jax
import jax.numpy as jnp
import numpy as np

from vlalign_jax.models import stored


def test_int8_is_within_half_a_step_of_each_vector():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(3, 5, 24)) * 10.0 ** rng.integers(-6, 6, (3, 5, 1))
  vectors[1, 2] = 0
  vectors = vectors.astype(np.float32)
  found = jax.device_get(stored.store(jnp.asarray(vectors), "int8"))
  assert (found.numbers.dtype, found.scales.dtype) == (np.int8, np.float32)
  assert np.abs(found.numbers).max() == 127
  largest = np.abs(vectors).max(-1, keepdims=True)
  error = np.abs(found.numbers * found.scales[..., None] - vectors)
  assert (error <= largest / 254 * (1 + 1e-4)).all()
  assert not found.numbers[1, 2].any()


def test_products_and_sums_are_those_of_what_is_stored():
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  queries, weights = draw(2, 3, 8), rng.random((2, 3, 5), np.float32)
  kept = stored.store(jnp.asarray(draw(2, 5, 8)), "int8")
  vectors = np.asarray(kept.numbers, np.float64) * np.asarray(kept.scales)[..., None]
  products = stored.products("BQD,BSD->BQS", queries, kept)
  np.testing.assert_allclose(products, queries @ vectors.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
  sums = stored.sums("BQS,BSD->BQD", weights, kept, jnp.float32)
  np.testing.assert_allclose(sums, weights @ vectors, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_of_the_arrays():
  for dtype, itemsize in (("model", 2), ("int8", 2), ("model", 4)):
    kept = stored.zeros((3, 24), jnp.dtype(f"{'b' * (itemsize == 2)}float{8 * itemsize}"), dtype)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert 3 * stored.vector_bytes(24, itemsize, dtype) == held
