"""ZeRO stages as shardings over `fsdp` (Rajbhandari et al. 2020).

Stage 0 splits nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters. `tensor`
splits the same arrays at every stage.
"""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey, tree_map_with_path

from vlalign_jax.errors import InputError
from vlalign_jax.sharding import rules

HOST_MEMORY = "pinned_host"


def _path(keys) -> str:
  """Returns the parameter path of a leaf; containers other than dicts do not count."""
  return "/".join(str(key.key) for key in keys if isinstance(key, DictKey))


def shardings(mesh: Mesh, tree, split: bool):
  """Returns the shardings of a tree of arrays or shapes.

  Args:
    mesh: the mesh.
    tree: nested dicts of parameters, or containers of these (an optimizer's state).
    split: whether to split over `fsdp`.
  """

  def sharding(keys, leaf):
    return NamedSharding(mesh, rules.spec(_path(keys), leaf.shape, mesh, split))

  return tree_map_with_path(sharding, tree)


def state_shardings(mesh: Mesh, state, zero_stage: int):
  """Returns a TrainState's shardings: parameters are split from stage 3, the others from 1."""
  params = shardings(mesh, state.params, split=zero_stage >= 3)
  return shardings(mesh, state, split=zero_stage >= 1)._replace(params=params)


def offload(mesh: Mesh, optimizer):
  """Returns an optimizer's shardings with host memory for its arrays; counters stay on devices.

  Args:
    mesh: the mesh.
    optimizer: tree of shapes with shardings.

  Raises:
    InputError: the devices cannot access host memory.
  """
  device = mesh.devices.flat[0]
  kinds = {memory.kind for memory in device.addressable_memories()}
  if HOST_MEMORY not in kinds:
    raise InputError(
      f"mesh.offload_optimizer: devices of type {device.device_kind} can access "
      f"{', '.join(sorted(kinds))} memory, not {HOST_MEMORY}; set it to false"
    )
  return jax.tree.map(
    lambda leaf: leaf.sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else leaf.sharding,
    optimizer,
  )


def constrain_gradients(mesh: Mesh, gradients, zero_stage: int):
  """Makes the compiler reduce-scatter gradients, from stage 2 on, instead of all-reducing them."""
  split = shardings(mesh, gradients, split=zero_stage >= 2)
  return jax.lax.with_sharding_constraint(gradients, split)
