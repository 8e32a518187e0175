"""The device mesh: `data` and `fsdp` split the batch, `fsdp` also splits states (ZeRO)."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.errors import InputError

AXES = ("data", "fsdp")
# A batch's first axis, its rows, is split over both.
BATCH = PartitionSpec(AXES)


def make_mesh(mesh_config, devices=None) -> Mesh:
  """A mesh over all devices.

  Args:
    mesh_config: has `data` and `fsdp`; one of them may be -1: what the other leaves.
    devices: default: all devices of all processes.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count, data, fsdp = len(devices), mesh_config.data, mesh_config.fsdp
  if data == -1 and fsdp > 0:
    data = count // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = count // data
  if data < 1 or fsdp < 1 or data * fsdp != count:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    raise InputError(
      f"mesh.data={mesh_config.data} and mesh.fsdp={mesh_config.fsdp} do not make {count} devices; "
      f"sizes that do divide it: {', '.join(map(str, divisors))} (one of the two may be -1)"
    )
  return jax.make_mesh(
    (data, fsdp), AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose first axis is rows."""
  return NamedSharding(mesh, BATCH)


def place(tree, shardings):
  """A tree of shapes with the shardings of another tree."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


def row_blocks(mesh: Mesh | None) -> int:
  """Over how many devices rows are split; 1 without a mesh."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in AXES)


def constrain_rows(x, mesh: Mesh | None):
  """Keeps activations split by rows.

  Without it the compiler may split them like the parameters they meet and move activations of the
  global batch instead of one layer's parameters.
  """
  return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def constrain_replicated(x, mesh: Mesh | None):
  """Gathers a parameter once, before a loop that uses it."""
  return x if mesh is None else jax.lax.with_sharding_constraint(x, replicated(mesh))


def to_device(mesh: Mesh, batch: dict):
  """This process's rows of a batch (dict of arrays) as global arrays over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }


def head_chunk(mesh: Mesh) -> int:
  """Positions whose logits are computed at a time: enough for the matrix units, and no more."""
  return 128 if mesh.devices.flat[0].platform == "cpu" else 1024
