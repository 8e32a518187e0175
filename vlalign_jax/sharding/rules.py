"""Where parameters go: the one place that knows their names.

A rule gives mesh axes for the last dimensions of the parameters that its pattern matches; the first
match counts. `tensor` splits heads, MLP columns and the vocabulary (Shoeybi et al. 2019,
Megatron-LM): columns of what enters a block, rows of what leaves it, so that a block needs one sum.
`fsdp` is where ZeRO splits.
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
  # Adapters split where their map does; the rank, which is small, is the last choice.
  (r".*/(query|key|value|gate|up)/lora_b", (None, "tensor")),
  (r".*/(out|down)/lora_a", ("tensor", None)),
  (r".*/lora_a", ("fsdp", None)),
  (r".*/lora_b", (None, "fsdp")),
  (r".*/kernel", (None, "fsdp")),
  (r".*", ("fsdp",)),
)
# Splitting less than this over fsdp costs more in messages than it saves in memory.
MIN_SIZE = 2**14


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, split: bool) -> PartitionSpec:
  """The placement of a parameter, or of anything that has its shape.

  Where `fsdp` does not divide its dimension evenly it takes another one, the layers of a stack last
  (a layer can then not be gathered by itself). What cannot be split at all is replicated, with a
  line in the log.

  Args:
    path: such as `language/layers/attention/query/kernel`.
    shape: of the whole parameter; a stack of layers has the layers first.
    mesh: the mesh.
    split: whether ZeRO splits it over `fsdp`.
  """
  stacked = "layers" in path.split("/")
  if len(shape) <= stacked:
    return PartitionSpec()
  sizes = {"tensor": mesh.shape["tensor"], "fsdp": mesh.shape["fsdp"] if split else 1}
  if math.prod(shape[stacked:]) < MIN_SIZE:
    sizes["fsdp"] = 1
  wanted = next(axes for pattern, axes in RULES if re.fullmatch(pattern, path))
  wanted = wanted[-(len(shape) - stacked) :]
  first = len(shape) - len(wanted)
  at = {axis: first + place for place, axis in enumerate(wanted) if axis}

  placed: list[str | None] = [None] * len(shape)
  if "tensor" in at and sizes["tensor"] > 1:
    if shape[at["tensor"]] % sizes["tensor"] == 0:
      placed[at["tensor"]] = "tensor"
    else:
      _log_whole(path, shape, "tensor", sizes["tensor"])
  if sizes["fsdp"] > 1:
    others = sorted(range(stacked, len(shape)), key=lambda place: -shape[place])
    places = [at["fsdp"], *others] if "fsdp" in at else others
    places += [0] * stacked
    fits = [p for p in places if placed[p] is None and shape[p] % sizes["fsdp"] == 0]
    if fits:
      placed[fits[0]] = "fsdp"
    else:
      _log_whole(path, shape, "fsdp", sizes["fsdp"])
  while placed and placed[-1] is None:
    placed.pop()
  return PartitionSpec(*placed)


@functools.cache
def _log_whole(path: str, shape: tuple[int, ...], axis: str, size: int) -> None:
  """Once for a parameter, and not again for its gradient and moments."""
  logging.info(
    "%s %s does not divide over mesh.%s=%d: every device along it holds it whole",
    path,
    shape,
    axis,
    size,
  )
