"""Nested dicts of parameters and the path strings that rules are written for."""

import math
from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": x}} to {"a/b": x}."""
  flat = {}
  for key, value in tree.items():
    path = f"{prefix}{key}"
    flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} to {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[dict, dict]:
  """Two trees: the leaves whose path is chosen, and the others. `merge` puts them together."""
  flat = flatten(tree)
  return (
    unflatten({path: leaf for path, leaf in flat.items() if chosen(path)}),
    unflatten({path: leaf for path, leaf in flat.items() if not chosen(path)}),
  )


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """The union of two trees without common leaves."""
  a, b = flatten(first), flatten(second)
  if a.keys() & b.keys():
    raise ValueError(f"both trees hold {sorted(a.keys() & b.keys())}")
  return unflatten(a | b)


def map_paths(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
  """A tree of `function(path, leaf)`."""
  return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Mapping[str, Any]) -> int:
  """The number of elements of all leaves."""
  return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())
