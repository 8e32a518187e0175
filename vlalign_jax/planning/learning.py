"""What of a model learns in a step, and what it is made of: read from the step's own parameters."""

import dataclasses
import math

from vlalign_jax import trees
from vlalign_jax.models import lora


@dataclasses.dataclass(frozen=True)
class Map:
  """A linear map, or as many equal ones as there are layers.

  Attributes:
    size: elements of the kernels.
    outputs: of one.
    layers: how many.
    rank: of the adapters beside them; 0: they have none.
    trained: whether the kernels themselves are.
  """

  size: int
  outputs: int
  layers: int
  rank: int
  trained: bool

  @property
  def down(self) -> int:
    """Elements of the adapters' first matrices, which bring inputs down to the rank."""
    return self.size // self.outputs * self.rank

  @property
  def up(self) -> int:
    """Elements of the adapters' second matrices."""
    return self.layers * self.outputs * self.rank

  @property
  def learns(self) -> bool:
    """Whether anything of it is trained."""
    return self.trained or self.rank > 0


@dataclasses.dataclass(frozen=True)
class Learning:
  """What a program trains.

  Attributes:
    maps: path -> linear map, in the order of paths.
    trained: paths of the parameters that are.
  """

  maps: dict[str, Map]
  trained: frozenset[str]

  def under(self, prefix: str) -> dict[str, Map]:
    """The maps whose paths start so."""
    return {path: found for path, found in self.maps.items() if path.startswith(prefix)}

  def any(self, *prefixes: str) -> bool:
    """Whether a parameter is trained whose path starts with one of these."""
    return any(path.startswith(prefixes) for path in self.trained)

  @property
  def into_language(self) -> bool:
    """Whether gradients go below the language model's layers."""
    return self.any("vision/", "projector/", "language/embedding/")

  @property
  def language(self) -> bool:
    """Whether gradients go through the language model's layers, which are one loop."""
    return self.into_language or self.any("language/layers/")


def of(program) -> Learning:
  """What a `steps.program.Program` trains."""
  shapes = trees.flatten(program.params)
  trained = frozenset(trees.flatten(program.state.params))
  maps = {}
  for path in sorted(lora.linear_maps(shapes)):
    shape, adapter = shapes[f"{path}/kernel"].shape, shapes.get(f"{path}/lora_a")
    maps[path] = Map(
      size=math.prod(shape),
      outputs=shape[-1],
      layers=math.prod(shape[:-2]),
      rank=0 if adapter is None else adapter.shape[-1],
      trained=f"{path}/kernel" in trained,
    )
  return Learning(maps, trained)
