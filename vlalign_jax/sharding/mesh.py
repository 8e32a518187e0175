"""The device mesh: `data` and `fsdp` split the batch, `fsdp` states too (ZeRO), `tensor` layers."""

import collections
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlalign_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
# A batch's first axis, its rows, is split over these.
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)


def make_mesh(mesh_config, devices=None) -> Mesh:
  """A mesh over all devices, the fastest links for the axes that communicate the most.

  Args:
    mesh_config: has `data`, `fsdp` and `tensor`; one of them may be -1: what the others leave.
    devices: default: all devices of all processes.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or several slices of a TPU
      cannot be told apart along `data` or `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes({axis: mesh_config[axis] for axis in AXES}, len(devices))
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(wanted: dict[str, int], count: int) -> tuple[int, ...]:
  """The wanted sizes with -1 filled in."""
  known = math.prod(size for size in wanted.values() if size != -1)
  open_axes = [axis for axis, size in wanted.items() if size == -1]
  given = ", ".join(f"mesh.{axis}={size}" for axis, size in wanted.items())
  if len(open_axes) > 1 or min(wanted.values()) < -1 or 0 in wanted.values():
    raise InputError(f"{given}: sizes are at least 1; one of them may be -1, what the others leave")
  if count % known or (not open_axes and known != count):
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    nearest = min(divisors, key=lambda n: (abs(n - known), n))
    raise InputError(
      f"{given}: {known} does not divide into {count} devices; the nearest size that does is "
      f"{nearest}"
      if open_axes
      else f"{given} make {known} devices, and there are {count}; set one of them to -1, or choose "
      f"sizes from {', '.join(map(str, divisors))} whose product is {count}"
    )
  return tuple(count // known if size == -1 else size for size in wanted.values())


def _arrange(sizes: tuple[int, ...], devices):
  """Devices as an array[data, fsdp, tensor]: `tensor` among neighbours, slices along the first."""
  slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  # Between slices the network is slow: it shall carry sums of gradients, once a step.
  for axis in range(len(ROWS)):
    if sizes[axis] % len(slices) == 0:
      between = [1] * len(sizes)
      between[axis] = len(slices)
      within = [size // parts for size, parts in zip(sizes, between, strict=True)]
      return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
      )
  raise InputError(
    f"{len(slices)} slices: mesh.data={sizes[0]} or mesh.fsdp={sizes[1]} must be a multiple of "
    f"{len(slices)}; the nearest are {nearest_multiples(sizes[0], len(slices))}"
  )


def nearest_multiples(number: int, of: int) -> str:
  """The multiples of `of` next to a number that is none, for messages."""
  below = number // of * of
  return f"{below} and {below + of}" if below else str(of)


def check_batch(batch_size: int, grad_accumulation: int, pack: bool, mesh: Mesh) -> None:
  """Refuses a batch that leaves devices without work.

  Args:
    batch_size: examples of a step.
    grad_accumulation: micro-batches of a step.
    pack: whether several examples share a row; without, each has its own.
    mesh: over which rows are split.

  Raises:
    InputError: names the nearest valid sizes.
  """
  shares = row_blocks(mesh) * grad_accumulation
  if batch_size < shares or (not pack and batch_size % shares):
    raise InputError(
      f"batch_size={batch_size} does not fill {row_blocks(mesh)} row shards (mesh.data x "
      f"mesh.fsdp) x {grad_accumulation} micro-batches evenly; the nearest that do are "
      f"{nearest_multiples(batch_size, shares)}"
    )


def check_heads(mesh: Mesh, heads: int, kv_heads: int) -> None:
  """Refuses a `tensor` axis that would cut heads of the language model.

  Raises:
    InputError: names the sizes that fit.
  """
  common = math.gcd(heads, kv_heads)
  if common % tensor_size(mesh):
    fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    raise InputError(
      f"mesh.tensor={tensor_size(mesh)} does not divide {heads} heads and {kv_heads} key/value "
      f"heads; choose from {fits}"
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
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def tensor_size(mesh: Mesh | None) -> int:
  """Over how many devices heads, MLP columns and the vocabulary are split; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape["tensor"]


def constrain_rows(x, mesh: Mesh | None):
  """Keeps activations split by rows.

  Without it the compiler may split them like the parameters they meet and move activations of the
  global batch instead of one layer's parameters.
  """
  return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def constrain_tensor(x, mesh: Mesh | None, axis: int):
  """Keeps activations split by rows, and by heads or columns along `axis` over `tensor`.

  An axis that does not divide stays whole.
  """
  if mesh is None or tensor_size(mesh) == 1 or x.shape[axis] % tensor_size(mesh):
    return constrain_rows(x, mesh)
  spec = [ROWS] + [None] * (x.ndim - 1)
  spec[axis] = "tensor"
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def constrain_vocabulary(x, mesh: Mesh | None):
  """Places what has the vocabulary as its last axis: over `tensor`, and gathered over `fsdp`.

  Args:
    x: [D, V], or [row blocks, .., V] with the first axis split like rows.
    mesh: the mesh; None: nothing to do.
  """
  if mesh is None:
    return x
  columns = "tensor" if x.shape[-1] % tensor_size(mesh) == 0 else None
  spec = PartitionSpec(*([None, columns] if x.ndim == 2 else [ROWS, None, columns]))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def scatter_head_gradient(x, mesh: Mesh | None):
  """Sums the head's gradient [D, V] over rows straight into parts over `fsdp` and `tensor`.

  A sum that every device holds whole before it is cut would be the largest array of a step.
  """
  if mesh is None:
    return x
  axes = ("fsdp", "tensor")
  spec = [
    axis if n % mesh.shape[axis] == 0 else None for n, axis in zip(x.shape, axes, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def head_chunk(mesh: Mesh) -> int:
  """Positions whose logits are computed at a time: enough for the matrix units, and no more."""
  return 128 if mesh.devices.flat[0].platform == "cpu" else 1024
