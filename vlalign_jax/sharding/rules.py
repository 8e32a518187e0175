"""Placement of parameters over the mesh, by their names.

A rule gives mesh axes for the last dimensions of the parameters that its pattern matches; the first
match counts. `tensor` splits heads, MLP columns and the vocabulary (Shoeybi et al. 2019,
Megatron-LM): columns of a block's input kernels, rows of its output kernel, so that a block needs
one sum over devices. `fsdp` is the axis of ZeRO.
"""

import functools
import math
import re

from absl import logging
from jax.sharding import Mesh, PartitionSpec

RULES = (
  (r"language/embedding/embedding", ("tensor", "fsdp")),  # [V, D]
  (r"language/head/kernel", ("fsdp", "tensor")),  # [D, V]
  (r".*/(query|key|value|gate|up)/kernel", ("fsdp", "tensor")),
  (r".*/(query|key|value|gate|up)/bias", ("tensor",)),
  (r".*/(out|down)/kernel", ("tensor", "fsdp")),
  # Adapters are split like their kernels; the rank, which is small, only if nothing else fits.
  (r".*/(query|key|value|gate|up)/lora_b", (None, "tensor")),
  (r".*/(out|down)/lora_a", ("tensor", None)),
  (r".*/lora_a", ("fsdp", None)),
  (r".*/lora_b", (None, "fsdp")),
  (r".*/kernel", (None, "fsdp")),
  (r".*", ("fsdp",)),
)
# Splitting smaller parameters over fsdp costs more in messages than it saves in memory.
MIN_SIZE = 2**14


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, split: bool) -> PartitionSpec:
  """Returns the placement of a parameter, or of an array like it.

  If `fsdp` does not divide its dimension evenly, it splits another one; the layer axis of a stack
  is the last choice, because a layer can then not be gathered alone. A parameter that cannot be
  split is replicated, and this is logged.

  Args:
    path: such as `language/layers/attention/query/kernel`.
    shape: global shape; stacked layers have a layer axis first.
    mesh: the mesh.
    split: whether ZeRO splits it over `fsdp`.
  """
  stacked = "layers" in path.split("/")
  if len(shape) <= stacked:
    return PartitionSpec()
  sizes = {"tensor": mesh.shape["tensor"], "fsdp": mesh.shape["fsdp"] if split else 1}
  if math.prod(shape[stacked:]) < MIN_SIZE:
    sizes["fsdp"] = 1
  axes = next(axes for pattern, axes in RULES if re.fullmatch(pattern, path))
  axes = axes[-(len(shape) - stacked) :]
  first = len(shape) - len(axes)
  dims = {axis: first + n for n, axis in enumerate(axes) if axis}

  placement: list[str | None] = [None] * len(shape)
  if "tensor" in dims and sizes["tensor"] > 1:
    if shape[dims["tensor"]] % sizes["tensor"] == 0:
      placement[dims["tensor"]] = "tensor"
    else:
      _log_replicated(path, shape, "tensor", sizes["tensor"])
  if sizes["fsdp"] > 1:
    largest_first = sorted(range(stacked, len(shape)), key=lambda dim: -shape[dim])
    choices = [dims["fsdp"], *largest_first] if "fsdp" in dims else largest_first
    choices += [0] * stacked
    fits = [dim for dim in choices if placement[dim] is None and shape[dim] % sizes["fsdp"] == 0]
    if fits:
      placement[fits[0]] = "fsdp"
    else:
      _log_replicated(path, shape, "fsdp", sizes["fsdp"])
  while placement and placement[-1] is None:
    placement.pop()
  return PartitionSpec(*placement)


@functools.cache
def _log_replicated(path: str, shape: tuple[int, ...], axis: str, size: int) -> None:
  """Logs once for a parameter, and not again for its gradient and moments."""
  logging.info("%s %s: replicated, mesh.%s=%d does not divide it", path, shape, axis, size)
