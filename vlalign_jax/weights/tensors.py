"""Finds the tensors of a Hugging Face directory by their headers, and reads them one at a time."""

import dataclasses
import json
import math
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

from vlalign_jax.errors import InputError
from vlalign_jax.weights import names

# Name in safetensors -> dtype of numpy or ml_dtypes.
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Locates a tensor in a file.

  Attributes:
    file: a safetensors file.
    name: in that file.
    shape: of the tensor.
    stored: the name of its dtype in safetensors.
    offset: of its first byte in the file, where it is in row-major order.
  """

  file: str
  name: str
  shape: tuple[int, ...]
  stored: str = "F32"
  offset: int = 0

  @property
  def files(self) -> tuple[str, ...]:
    """All files that the values come from."""
    return (self.file,)

  @property
  def dtype(self) -> np.dtype:
    """The dtype in numpy.

    Raises:
      InputError: numpy does not have it.
    """
    if self.stored not in _DTYPES:
      raise InputError(
        f"{self.file}: {self.name} is stored as {self.stored}, which cannot be read; save it in "
        "bfloat16 or float32"
      )
    return np.dtype(_DTYPES[self.stored])

  def read(
    self,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
  ) -> np.ndarray:
    """Reads the tensor, or a part of it, into host memory, in the stored dtype.

    It reads the bytes of that part only. The file is not mapped: mapped pages would cost a page
    fault each and count as this process's memory.

    Args:
      rows: (start, stop) along the first axis; None: all.
      columns: (start, stop) along the second axis of a matrix; None: all.
      out: a contiguous array of the part's shape and dtype to read into; None: a new one.

    Raises:
      InputError: the file cannot be read, or ends early.
    """
    start, stop = rows or (0, self.shape[0] if self.shape else 1)
    width = math.prod(self.shape[1:])
    first, last = columns or (0, width)
    if out is None:
      lengths = (last - first,) if columns else self.shape[1:]
      out = np.empty((stop - start, *lengths) if self.shape else (), self.dtype)
    size = self.dtype.itemsize
    target = out.reshape(-1).view(np.uint8)
    if last - first == width:  # rows without a gap between them
      start, stop, first, last, width = 0, 1, start * width, stop * width, 0
    step = (last - first) * size
    try:
      file = os.open(self.file, os.O_RDONLY)
      try:
        for number, row in enumerate(range(start, stop)):
          part = target[number * step : (number + 1) * step]
          _fill(file, part, self.offset + (row * width + first) * size)
      finally:
        os.close(file)
    except OSError as error:
      raise InputError(
        f"{self.file}: {self.name} cannot be read ({error}); copy it again"
      ) from error
    return out


def _fill(file: int, target: np.ndarray, offset: int) -> None:
  """Reads bytes of an open file, starting at `offset`, until the target is full."""
  done = 0
  while done < len(target):
    count = os.preadv(file, [target[done:].data], offset + done)
    if not count:
      raise OSError("the file ends before it")
    done += count


def _files(directory: str, stem: str) -> list[str]:
  """Returns the paths of STEM.safetensors or of its shards."""
  index = os.path.join(directory, f"{stem}.safetensors.index.json")
  if os.path.isfile(index):
    with open(index, encoding="utf-8") as file:
      try:
        listed = sorted(set(json.load(file)["weight_map"].values()))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index: {error!r}") from error
    missing = [name for name in listed if not os.path.isfile(os.path.join(directory, name))]
    if missing:
      raise InputError(f"{index}: names files that are missing: {', '.join(missing)}")
    return [os.path.join(directory, name) for name in listed]
  single = os.path.join(directory, f"{stem}.safetensors")
  if os.path.isfile(single):
    return [single]
  files = os.listdir(directory) if os.path.isdir(directory) else []
  if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
    raise InputError(
      f"{directory}: only pickled weights there, which are not read; save them as safetensors "
      "(save_pretrained of transformers does)"
    )
  raise InputError(f"{directory}: no {stem}.safetensors and no {stem}.safetensors.index.json there")


def find_tensors(directory: str, stem: str = "model") -> dict[str, Tensor]:
  """Returns a directory's tensors by canonical name (see `names.canonical`); reads headers only.

  Args:
    directory: has STEM.safetensors, or its shards and their index.
    stem: of the files' names.

  Raises:
    InputError: there are no safetensors, or a file is missing, damaged or cut off.
  """
  tensors = {}
  for path in _files(directory, stem):
    tensors |= read_headers(path, names.canonical)
  return tensors


def read_headers(path: str, canonical: Callable[[str], str]) -> dict[str, Tensor]:
  """Returns the tensors of one file by canonical name.

  Raises:
    InputError: the file is damaged or cut off.
  """
  try:
    with safetensors.safe_open(path, "numpy"):  # checks that the header and the size agree
      pass
  except safetensors.SafetensorError as error:
    raise InputError(f"{path}: damaged or cut off ({error}); copy it again") from error
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  return {
    canonical(name): Tensor(
      path, name, tuple(at["shape"]), at["dtype"], 8 + length + at["data_offsets"][0]
    )
    for name, at in header.items()
  }
