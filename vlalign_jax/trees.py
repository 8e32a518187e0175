"""Converts nested dicts of parameters to path strings and back, and splits and merges them."""

import math
from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Converts {"a": {"b": x}} to {"a/b": x}."""
  flat = {}
  for key, value in tree.items():
    path = f"{prefix}{key}"
    flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Converts {"a/b": x} to {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[dict, dict]:
  """Splits a tree into the leaves whose path is chosen and the others; `merge` is the inverse."""
  flat = flatten(tree)
  return (
    unflatten({path: leaf for path, leaf in flat.items() if chosen(path)}),
    unflatten({path: leaf for path, leaf in flat.items() if not chosen(path)}),
  )


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the union of two trees that have no leaf in common."""
  a, b = flatten(first), flatten(second)
  if a.keys() & b.keys():
    raise ValueError(f"both trees have {sorted(a.keys() & b.keys())}")
  return unflatten(a | b)


def map_paths(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of `function(path, leaf)`."""
  return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Mapping[str, Any]) -> int:
  """Returns the number of elements of all leaves."""
  return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())
