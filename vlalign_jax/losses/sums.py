"""Sums from which metrics are made, and how to combine them over micro-batches and batches.

A value is a pair (sum, count), whose quotient is the metric, or a sum alone. A value whose name
begins with `min_` or `max_` is a minimum or maximum instead.
"""

from collections.abc import Iterable

import jax.numpy as jnp

_EXTREMES = {"min_": (min, jnp.minimum, jnp.inf), "max_": (max, jnp.maximum, -jnp.inf)}


def start(shapes: dict) -> dict:
  """Returns the neutral element of `combine`, float32[] each, for values like `shapes`."""

  def start_one(name, value):
    neutral = _EXTREMES[name[:4]][2] if name[:4] in _EXTREMES else 0.0
    neutral = jnp.full((), neutral, jnp.float32)
    return (neutral, neutral) if isinstance(value, tuple) else neutral

  return {name: start_one(name, value) for name, value in shapes.items()}


def combine(first: dict, second: dict) -> dict:
  """Combines the values of two batches, on the devices."""

  def combine_one(name, a, b):
    if name[:4] in _EXTREMES:
      return _EXTREMES[name[:4]][1](a, b)
    return (a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else a + b

  return {name: combine_one(name, first[name], second[name]) for name in first}


def total(parts: Iterable[dict]) -> dict:
  """Combines the values of all batches on the host.

  The results are Python floats: float32 cannot count beyond 2^24, 17 million tokens.
  """
  parts = list(parts)

  def combine_one(name, values):
    if name[:4] in _EXTREMES:
      return float(_EXTREMES[name[:4]][0](values))
    if isinstance(values[0], tuple):
      return tuple(sum(map(float, column)) for column in zip(*values, strict=True))
    return sum(map(float, values))

  return {name: combine_one(name, [part[name] for part in parts]) for name in parts[0]}


def quotients(values: dict) -> dict:
  """Divides each pair's sum by its count (0 if the count is 0); keeps the other values."""
  return {
    name: value[0] / (value[1] + (value[1] == 0)) if isinstance(value, tuple) else value
    for name, value in values.items()
  }
