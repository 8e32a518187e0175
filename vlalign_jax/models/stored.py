"""Keys and values as a cache stores them: as they are, or in int8 with a scale for each vector."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MODEL, INT8 = "model", "int8"
# The dtypes that keys and values may be stored in; MODEL: that of activations.
CACHE_DTYPES = (MODEL, INT8)
_LARGEST = 127


class Stored(NamedTuple):
  """Vectors of size D.

  Attributes:
    numbers: [..., D] in the dtype of activations, or int8[..., D].
    scales: float32[...], what int8 numbers are multiplied by; None: the numbers are the vectors.
  """

  numbers: jax.Array
  scales: jax.Array | None = None


def store(vectors, dtype: str) -> Stored:
  """Stores vectors [..., D]; int8 rounds each to 255 steps up to its largest element."""
  if dtype != INT8:
    return Stored(vectors)
  vectors = vectors.astype(jnp.float32)
  scales = jnp.max(jnp.abs(vectors), axis=-1) / _LARGEST
  steps = jnp.where(scales > 0, scales, 1.0)[..., None]
  return Stored(jnp.round(vectors / steps).astype(jnp.int8), scales)


def zeros(shape: tuple[int, ...], activations, dtype: str) -> Stored:
  """Returns vectors of zeros; `activations` is the dtype that they have unless dtype is int8."""
  if dtype != INT8:
    return Stored(jnp.zeros(shape, activations))
  return Stored(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def vector_bytes(size: int, itemsize: int, dtype: str) -> int:
  """Returns the bytes of a vector of so many elements, each of `itemsize` unless dtype is int8."""
  return size + 4 if dtype == INT8 else size * itemsize


def products(equation: str, queries, keys: Stored):
  """Returns float32 products [..., Q, S] of queries [..., Q, D] with keys [..., S, D]."""
  numbers = keys.numbers.astype(queries.dtype)
  found = jnp.einsum(equation, queries, numbers, preferred_element_type=jnp.float32)
  return found if keys.scales is None else found * keys.scales[..., None, :]


def sums(equation: str, weights, values: Stored, dtype):
  """Returns float32 sums [..., Q, D] of values [..., S, D], by float32 weights [..., Q, S]."""
  if values.scales is not None:
    weights = weights * values.scales[..., None, :]
  numbers = values.numbers.astype(dtype)
  return jnp.einsum(equation, weights.astype(dtype), numbers, preferred_element_type=jnp.float32)
