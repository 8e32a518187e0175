"""Reads tensors from a pickle of torch.save with torch's weights-only unpickler.

That unpickler makes tensors only, and refuses to call anything else that the pickle names.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from vlalign_jax.errors import InputError

if TYPE_CHECKING:
  import torch

# Earlier versions run code in spite of weights_only (CVE-2025-32434).
TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class PickledTensor:
  """Stands for `tensors.Tensor` in a pickle; if it has an adapter, `read` merges that."""

  file: str
  name: str
  tensor: "torch.Tensor"
  adapter: "tuple[torch.Tensor, torch.Tensor] | None" = None

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.tensor.shape)

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(str(self.tensor.dtype).removeprefix("torch."))

  def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
    """Returns a copy of the tensor, or of a range of its rows, in the stored dtype."""
    tensor = self.tensor
    if self.adapter:
      right, left = (part.float() for part in self.adapter)  # [in, r], [r, out]
      tensor = tensor.float() + (right @ left).T / right.shape[1]
    if rows:
      tensor = tensor[slice(*rows)]
    if tensor.dtype != self.tensor.dtype or self.dtype == ml_dtypes.bfloat16:
      return tensor.float().numpy().astype(self.dtype)
    return tensor.numpy().copy()


def read_pickle(path: str) -> "dict[str, torch.Tensor]":
  """Returns the memory-mapped tensors of a file of torch.save, without running code in the pickle.

  Raises:
    InputError: torch is missing or too old, or the file is damaged or has more than tensors.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f"{path}: reading it needs PyTorch, which nothing else here needs; pip install torch"
    ) from error
  version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
  if version < TORCH:
    raise InputError(
      f"{path}: torch {torch.__version__} may run code that a pickle hides; pip install 'torch>="
      f"{TORCH[0]}.{TORCH[1]}'"
    )
  try:
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as error:  # on a broken file, zipfile and the unpickler may raise anything
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"{path}: damaged, or not tensors alone ({reason}); save the model's state_dict again"
    ) from error
  if not isinstance(stored, dict) or not all(isinstance(x, torch.Tensor) for x in stored.values()):
    raise InputError(f"{path}: not a state_dict; save that of the model")
  return {name: tensor.detach() for name, tensor in stored.items()}
