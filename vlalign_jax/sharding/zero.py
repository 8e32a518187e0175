"""ZeRO stages as shardings (Rajbhandari et al. 2020): what is split over `fsdp`.

Stage 0 splits nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too. What `tensor`
splits is split at every stage.
"""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey, tree_map_with_path

from vlalign_jax.errors import InputError
from vlalign_jax.sharding import rules

HOST_MEMORY = "pinned_host"


def _path(keys) -> str:
  """The parameter path in the place of a leaf, whatever the containers around the parameters."""
  return "/".join(str(key.key) for key in keys if isinstance(key, DictKey))


def shardings(mesh: Mesh, tree, split: bool):
  """A tree of shardings for a tree of arrays or shapes.

  Args:
    mesh: the mesh.
    tree: nested dicts of parameters, or containers of such (an optimizer's state).
    split: whether to split over `fsdp`.
  """

  def sharding(keys, leaf):
    return NamedSharding(mesh, rules.spec(_path(keys), leaf.shape, mesh, split))

  return tree_map_with_path(sharding, tree)


def state_shardings(mesh: Mesh, state, zero_stage: int):
  """Shardings of a TrainState (of arrays or shapes): parameters from stage 3, the rest from 1."""
  params = shardings(mesh, state.params, split=zero_stage >= 3)
  return shardings(mesh, state, split=zero_stage >= 1)._replace(params=params)


def offload(mesh: Mesh, optimizer):
  """Shardings of an optimizer's state in the memory of the hosts; its counters stay where they are.

  Args:
    mesh: the mesh.
    optimizer: tree of shapes with shardings.

  Raises:
    InputError: the devices cannot reach their hosts' memory.
  """
  device = mesh.devices.flat[0]
  kinds = {memory.kind for memory in device.addressable_memories()}
  if HOST_MEMORY not in kinds:
    raise InputError(
      f"mesh.offload_optimizer: devices of type {device.device_kind} reach "
      f"{', '.join(sorted(kinds))} memory and not {HOST_MEMORY}; set it to false"
    )
  return jax.tree.map(
    lambda leaf: leaf.sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else leaf.sharding,
    optimizer,
  )


def constrain_gradients(mesh: Mesh, gradients, zero_stage: int):
  """From stage 2, makes the compiler reduce-scatter gradients instead of all-reducing them."""
  split = shardings(mesh, gradients, split=zero_stage >= 2)
  return jax.lax.with_sharding_constraint(gradients, split)
