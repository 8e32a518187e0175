"""Opens a PEFT directory as a model, with its adapters merged into their base weights."""

import dataclasses
import os

import numpy as np

from vlalign_jax.errors import InputError
from vlalign_jax.models.vlm import SCORE
from vlalign_jax.weights import names, peft
from vlalign_jax.weights.parts import ModelSource
from vlalign_jax.weights.tensors import Tensor

_KEY = "base_model_name_or_path"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedTensor(Tensor):
  """Holds a weight [out, in] and its adapter, a [r, in] and b [out, r]; `file` is the weight's."""

  base: Tensor
  a: Tensor
  b: Tensor
  scale: float

  @property
  def files(self) -> tuple[str, ...]:
    return (*self.base.files, *self.a.files)

  def read(
    self,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns the weight plus scale * b @ a, summed in float32, in the weight's dtype.

    Args:
      rows, columns, out: see `Tensor.read`.
    """
    weight, a, b = self.base.read(rows, columns), self.a.read(), self.b.read(rows)
    if columns:
      a = a[:, slice(*columns)]
    delta = self.scale * (b.astype(np.float32) @ a.astype(np.float32))
    merged = (weight.astype(np.float32) + delta).astype(weight.dtype)
    if out is None:
      return merged
    out[...] = merged
    return out


def base_of(directory: str) -> str:
  """Returns the model directory that a PEFT directory's adapters belong to.

  Raises:
    InputError: adapter_config.json does not name a directory on this machine.
  """
  path = os.path.join(directory, peft.CONFIG)
  base = peft.read_config(directory).get(_KEY)
  for candidate in (base, os.path.join(directory, base)) if base else ():
    if os.path.isdir(candidate):
      return candidate
  raise InputError(
    f"{path}: {_KEY} is {base!r}, which is not a directory; set it to the directory of the model "
    "that these adapters belong to"
  )


def with_adapters(base: ModelSource, directory: str) -> ModelSource:
  """Returns the base with a PEFT directory's adapters merged and its fully trained parameters.

  Args:
    base: an opened LLaVA.
    directory: a PEFT directory of adapters for it.

  Raises:
    InputError: the directory is damaged, or its adapters do not fit the base.
  """
  config, stored = peft.read_config(directory), peft.find_tensors(directory)
  if "score.weight" in stored and base.config.head != SCORE:
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, head=SCORE))
  model, tensors, wrong = base.config, dict(base.tensors), []
  known = {
    name.tensor.format(layer)
    for name in names.names_of(model)
    for layer in names.layers_of(name, model)
  }
  for name, tensor in stored.items():
    module, _, matrix = name.rpartition(".lora_")
    weight = f"{module}.weight"
    if matrix == "B.weight" and f"{module}.lora_A.weight" in stored:
      continue
    if not matrix and name in known:
      tensors[name] = tensor
    elif matrix == "A.weight" and weight in tensors and f"{module}.lora_B.weight" in stored:
      w, a, b = tensors[weight], tensor, stored[f"{module}.lora_B.weight"]
      if (b.shape[0], a.shape[1], a.shape[0]) != (*w.shape, b.shape[1]):
        wrong.append(f"{a.name} {a.shape} and {b.name} {b.shape} for {w.name} {w.shape}")
        continue
      scale = peft.scale(config, peft.module_name(module, model), a.shape[0])
      merged = f"{w.name} with {a.name} of {a.file}"
      tensors[weight] = MergedTensor(
        w.file, merged, w.shape, w.stored, w.offset, base=w, a=a, b=b, scale=scale
      )
    elif not names.is_unused(weight if matrix else name, model):
      wrong.append(f"unexpected {tensor.name} {tensor.shape}")
  if wrong:
    raise InputError(f"{directory}: its adapters do not fit the base:\n  " + "\n  ".join(wrong))
  return dataclasses.replace(base, tensors=tensors)
