"""Sums that make up what is reported: how those of micro-batches and batches become one.

A value is a pair (sum, count), whose quotient is reported, or a sum alone. Names that begin with
`min_` or `max_` are no sums: the least and the greatest counts.
"""

from collections.abc import Iterable

import jax.numpy as jnp

_EXTREMES = {"min_": (min, jnp.minimum, jnp.inf), "max_": (max, jnp.maximum, -jnp.inf)}


def start(shapes: dict) -> dict:
  """What changes nothing when it is combined with values of these names, float32[] each.

  Args:
    shapes: dict like the values'.
  """

  def one(name, value):
    first = _EXTREMES[name[:4]][2] if name[:4] in _EXTREMES else 0.0
    zero = jnp.full((), first, jnp.float32)
    return (zero, zero) if isinstance(value, tuple) else zero

  return {name: one(name, value) for name, value in shapes.items()}


def combine(first: dict, second: dict) -> dict:
  """The values of both together, on the devices."""

  def one(name, a, b):
    if name[:4] in _EXTREMES:
      return _EXTREMES[name[:4]][1](a, b)
    return (a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else a + b

  return {name: one(name, first[name], second[name]) for name in first}


def total(parts: Iterable[dict]) -> dict:
  """The values of all together, as floats: float32 could not count 17 million tokens.

  Args:
    parts: dicts of numbers, from the devices.
  """
  parts = list(parts)

  def one(name, values):
    if name[:4] in _EXTREMES:
      return float(_EXTREMES[name[:4]][0](values))
    if isinstance(values[0], tuple):
      return tuple(sum(float(value[place]) for value in values) for place in (0, 1))
    return sum(float(value) for value in values)

  return {name: one(name, [part[name] for part in parts]) for name in parts[0]}


def quotients(values: dict) -> dict:
  """What is reported: quotients of pairs (0 where nothing counts), the others as they are."""
  return {
    name: value[0] / (value[1] + (value[1] == 0)) if isinstance(value, tuple) else value
    for name, value in values.items()
  }
