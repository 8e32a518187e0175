"""Tensors of a pickle that torch.save wrote, read by torch's weights-only unpickler.

It makes tensors and refuses to call anything else that the pickle names.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from vlalign_jax.errors import InputError

if TYPE_CHECKING:
  import torch

# Earlier ones run code that weights_only should refuse (CVE-2025-32434).
TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class PickledTensor:
  """As `tensors.Tensor`, of a pickle; its adapter, if it has one, is merged when it is read."""

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
    """A copy in host memory, in the stored dtype; of some rows, if asked."""
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
  """The tensors of a file of torch.save, mapped; nothing that a pickle asks for is run.

  Raises:
    InputError: no torch, or an old one; not a file of tensors alone.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f"{path}: reading it takes PyTorch, which nothing else here needs; pip install torch"
    ) from error
  version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
  if version < TORCH:
    raise InputError(
      f"{path}: torch {torch.__version__} may run what a pickle hides; pip install 'torch>="
      f"{TORCH[0]}.{TORCH[1]}'"
    )
  try:
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as error:  # zip files and unpicklers raise nearly anything on a broken file
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"{path}: damaged, or not tensors alone ({reason}); save the model's state_dict again"
    ) from error
  if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
    raise InputError(f"{path}: not a state_dict; save the model's")
  return {name: tensor.detach() for name, tensor in found.items()}
