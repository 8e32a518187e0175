"""The device mesh: `data` and `fsdp` split rows, `fsdp` also states (ZeRO), `tensor` layers."""

import collections
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlalign_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
# The axes that split rows, the first axis of a batch.
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)


def make_mesh(mesh_config, devices=None) -> Mesh:
  """Makes a mesh over all devices, with the fastest links for the axes that communicate most.

  Args:
    mesh_config: has `data`, `fsdp` and `tensor`; one of them may be -1, to use all devices.
    devices: None: all devices of all processes.

  Raises:
    InputError: the product of the sizes is not the number of devices, or neither `data` nor `fsdp`
      is a multiple of the number of TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes({axis: mesh_config[axis] for axis in AXES}, len(devices))
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(sizes: dict[str, int], count: int) -> tuple[int, ...]:
  """Returns the sizes for `count` devices, with -1 replaced."""
  known = math.prod(size for size in sizes.values() if size != -1)
  open_axes = list(sizes.values()).count(-1)
  settings = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  if open_axes > 1 or min(sizes.values()) < -1 or 0 in sizes.values():
    raise InputError(f"{settings}: sizes are at least 1; one of them may be -1, to use all devices")
  if count % known or (not open_axes and known != count):
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    nearest = min(divisors, key=lambda n: (abs(n - known), n))
    if open_axes:
      problem = f": {known} does not divide {count} devices; the nearest size that does is "
      problem += str(nearest)
    else:
      problem = (
        f" make {known} devices, and there are {count}; set one of them to -1, or choose sizes "
        f"from {', '.join(map(str, divisors))} whose product is {count}"
      )
    raise InputError(settings + problem)
  return tuple(count // known if size == -1 else size for size in sizes.values())


def _arrange(sizes: tuple[int, ...], devices):
  """Returns devices as an array[data, fsdp, tensor]: `tensor` over neighbors, slices first."""
  slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  # The network between slices is slow: only sums of gradients should cross it, once per step.
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


def nearest_multiples(number: int, factor: int) -> str:
  """Returns the multiples of `factor` below and above a number, for messages."""
  below = number // factor * factor
  return f"{below} and {below + factor}" if below else str(factor)


def check_batch(batch_size: int, grad_accumulation: int, pack: bool, mesh: Mesh) -> None:
  """Raises InputError for a batch that leaves devices without work.

  Args:
    batch_size: examples per step.
    grad_accumulation: micro-batches per step.
    pack: whether several examples share a row.
    mesh: splits rows.
  """
  shares = row_blocks(mesh) * grad_accumulation
  if batch_size < shares or (not pack and batch_size % shares):
    raise InputError(
      f"batch_size={batch_size} does not fill {row_blocks(mesh)} row shards (mesh.data x "
      f"mesh.fsdp) x {grad_accumulation} micro-batches evenly; the nearest that do are "
      f"{nearest_multiples(batch_size, shares)}"
    )


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
  """Raises InputError if a mesh, of the config's `key`, does not split so many rows evenly."""
  if rows % row_blocks(mesh):
    fits = ", ".join(str(n) for n in range(1, mesh.size + 1) if not (rows % n or mesh.size % n))
    raise InputError(
      f"config.{key} splits {rows} prompts over {row_blocks(mesh)} devices; choose data from {fits}"
    )


def check_heads(mesh: Mesh, heads: int, kv_heads: int) -> None:
  """Raises InputError if `tensor` does not divide the numbers of heads of the language model."""
  common = math.gcd(heads, kv_heads)
  if common % tensor_size(mesh):
    fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    raise InputError(
      f"mesh.tensor={tensor_size(mesh)} does not divide {heads} heads and {kv_heads} key/value "
      f"heads; choose from {fits}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device has in full."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is rows."""
  return NamedSharding(mesh, BATCH)


def place(tree, shardings):
  """Returns a tree of shapes with the shardings of another tree."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


def row_blocks(mesh: Mesh | None) -> int:
  """Returns over how many devices rows are split; 1 without a mesh."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def tensor_size(mesh: Mesh | None) -> int:
  """Returns over how many devices heads, MLP columns and the vocabulary are split."""
  return 1 if mesh is None else mesh.shape["tensor"]


def constrain_rows(x, mesh: Mesh | None):
  """Keeps activations split by rows.

  Otherwise the compiler may split them like the parameters, and move the global batch's activations
  between devices instead of one layer's parameters.
  """
  return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def constrain_tensor(x, mesh: Mesh | None, axis: int):
  """Keeps activations split by rows, and `axis` (heads or columns) over `tensor` if it divides."""
  if mesh is None or tensor_size(mesh) == 1 or x.shape[axis] % tensor_size(mesh):
    return constrain_rows(x, mesh)
  spec = [ROWS] + [None] * (x.ndim - 1)
  spec[axis] = "tensor"
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def constrain_vocabulary(x, mesh: Mesh | None):
  """Splits the last axis, the vocabulary, over `tensor`, and gathers the others over `fsdp`.

  Args:
    x: [D, V], or [row blocks, .., V], whose first axis is split like rows.
    mesh: None: does nothing.
  """
  if mesh is None:
    return x
  columns = "tensor" if x.shape[-1] % tensor_size(mesh) == 0 else None
  spec = PartitionSpec(*([None, columns] if x.ndim == 2 else [ROWS, None, columns]))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def scatter_head_gradient(x, mesh: Mesh | None):
  """Splits the head's gradient [D, V] over `fsdp` and `tensor`, so that its sum is a scatter.

  The full sum on every device would be the largest array of a step.
  """
  if mesh is None:
    return x
  axes = ("fsdp", "tensor")
  spec = [
    axis if n % mesh.shape[axis] == 0 else None for n, axis in zip(x.shape, axes, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def head_chunk(mesh: Mesh) -> int:
  """Returns how many positions' logits to compute at a time: just enough for the matrix units."""
  return 128 if mesh.devices.flat[0].platform == "cpu" else 1024
