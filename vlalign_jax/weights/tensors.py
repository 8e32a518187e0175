"""Tensors of a Hugging Face directory: found by header, read one at a time."""

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np
import safetensors

from vlalign_jax.errors import InputError
from vlalign_jax.weights import names


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that lies in a file, not yet read."""

  file: str
  name: str
  shape: tuple[int, ...]

  @property
  def files(self) -> tuple[str, ...]:
    """All files that its values come from."""
    return (self.file,)

  def read(self) -> np.ndarray:
    """A copy in host memory, in the stored dtype.

    The file is mapped only for the length of the call: pages of a mapping that stays open count as
    this process's memory until they are evicted.
    """
    with safetensors.safe_open(self.file, "numpy") as file:
      return file.get_tensor(self.name)


def _files(directory: str, stem: str) -> list[str]:
  index = os.path.join(directory, f"{stem}.safetensors.index.json")
  if os.path.isfile(index):
    with open(index, encoding="utf-8") as file:
      try:
        listed = sorted(set(json.load(file)["weight_map"].values()))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index: {error!r}") from error
    absent = [name for name in listed if not os.path.isfile(os.path.join(directory, name))]
    if absent:
      raise InputError(f"{index}: names files that are not there: {', '.join(absent)}")
    return [os.path.join(directory, name) for name in listed]
  single = os.path.join(directory, f"{stem}.safetensors")
  if os.path.isfile(single):
    return [single]
  found = os.listdir(directory) if os.path.isdir(directory) else []
  if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
    raise InputError(
      f"{directory}: only pickled weights there, which are not read; save them as safetensors "
      "(save_pretrained in transformers does)"
    )
  raise InputError(f"{directory}: no {stem}.safetensors and no {stem}.safetensors.index.json there")


def find_tensors(directory: str, stem: str = "model") -> dict[str, Tensor]:
  """All tensors of a directory by canonical name (see `names.canonical`); reads headers only.

  Args:
    directory: with STEM.safetensors, or its shards and their index.
    stem: of the files' names.

  Raises:
    InputError: no safetensors, a missing shard, or a damaged or cut-off file.
  """
  tensors = {}
  for path in _files(directory, stem):
    tensors |= read_headers(path, names.canonical)
  return tensors


def read_headers(path: str, canonical: Callable[[str], str]) -> dict[str, Tensor]:
  """The tensors of one file by canonical name.

  Raises:
    InputError: the file is damaged or cut off.
  """
  try:
    with safetensors.safe_open(path, "numpy") as file:
      return {
        canonical(name): Tensor(path, name, tuple(file.get_slice(name).get_shape()))
        for name in file.keys()  # noqa: SIM118 (not a dict)
      }
  except safetensors.SafetensorError as error:
    raise InputError(f"{path}: damaged or cut off ({error}); copy it again") from error
