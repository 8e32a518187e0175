"""ZeRO stages as shardings (Rajbhandari et al. 2020): what is split over `fsdp`.

Stage 0 splits nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Splitting less than this costs more in messages than it saves in memory.
MIN_SIZE = 2**14


def split_spec(shape: tuple[int, ...], parts: int) -> PartitionSpec:
  """Splits the longest axis that divides evenly; small or uneven arrays stay whole.

  A stacked parameter's layer axis is passed over where another will do, so that a layer can be
  gathered by itself.
  """
  size = 1
  for length in shape:
    size *= length
  if parts == 1 or size < MIN_SIZE:
    return PartitionSpec()
  axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
  if len(shape) > 2:
    axes = [axis for axis in axes if axis > 0] or axes
  if not axes:
    return PartitionSpec()
  longest = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def shardings(mesh: Mesh, tree, split: bool):
  """A tree of shardings for a tree of arrays or shapes: split over `fsdp`, or whole."""
  parts = mesh.shape["fsdp"] if split else 1
  return jax.tree.map(lambda leaf: NamedSharding(mesh, split_spec(leaf.shape, parts)), tree)


def state_shardings(mesh: Mesh, state, zero_stage: int):
  """Shardings of a TrainState (of arrays or shapes): parameters from stage 3, the rest from 1."""
  params = shardings(mesh, state.params, split=zero_stage >= 3)
  return shardings(mesh, state, split=zero_stage >= 1)._replace(params=params)


def constrain_gradients(mesh: Mesh, gradients, zero_stage: int):
  """From stage 2, makes the compiler reduce-scatter gradients instead of all-reducing them."""
  if zero_stage < 2:
    return gradients
  return jax.lax.with_sharding_constraint(gradients, shardings(mesh, gradients, split=True))
