"""How the hosts of a run divide a batch's rows, sum counts, and check that they agree."""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax.errors import InputError
from vlalign_jax.sharding import mesh as meshes


@dataclasses.dataclass(frozen=True)
class RowShare:
  """The rows that this host makes, of a batch cut into `count` equal blocks of consecutive rows.

  Attributes:
    blocks: indices of the blocks, ascending; if `tensor` spans hosts, several have the same blocks.
    count: number of all blocks.
  """

  blocks: tuple[int, ...]
  count: int


def row_share(mesh: Mesh) -> RowShare:
  """Returns the rows that are on this host's devices."""
  count = meshes.row_blocks(mesh)
  indices = meshes.batch_sharding(mesh).addressable_devices_indices_map((count,))
  blocks = {
    block for index in indices.values() if index for block in range(*index[0].indices(count))
  }
  return RowShare(tuple(sorted(blocks)), count)


def to_device(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts a batch on devices, as global arrays over the mesh.

  Args:
    mesh: the mesh.
    batch: arrays whose first axis is this host's rows: those of `row_share(mesh).blocks`, block by
      block.
  """
  share, sharding = row_share(mesh), meshes.batch_sharding(mesh)

  def place(array: np.ndarray) -> jax.Array:
    block_rows = len(array) // len(share.blocks)
    local_start = {block * block_rows: n * block_rows for n, block in enumerate(share.blocks)}

    def select_block(index) -> np.ndarray:
      start, _, _ = index[0].indices(block_rows * share.count)
      return array[local_start[start] : local_start[start] + block_rows]

    shape = (block_rows * share.count, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, select_block)

  return {name: place(array) for name, array in batch.items()}


def whole_to_device(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts a batch on devices whose arrays have the rows of all hosts, and are equal on all hosts."""
  sharding = meshes.batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    for name, array in batch.items()
  }


def fetch(arrays):
  """Returns a tree of global arrays as full numpy arrays; all hosts must call it together."""
  if jax.process_count() == 1:
    return jax.device_get(arrays)
  return multihost_utils.process_allgather(arrays, tiled=True)


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
  """Returns int[b], indices of the rows that this host makes, in the order of `to_device`."""
  share = row_share(mesh)
  per_block = rows // share.count
  return (np.array(share.blocks)[:, None] * per_block + np.arange(per_block)).reshape(-1)


def rows_owned(mesh: Mesh, rows: int) -> np.ndarray:
  """Returns bool[rows], whether this host owns a row: it is the first of the row's hosts."""
  count, owner = meshes.row_blocks(mesh), {}
  for device, (index,) in meshes.batch_sharding(mesh).devices_indices_map((count,)).items():
    for block in range(*index.indices(count)):
      owner[block] = min(owner.get(block, device.process_index), device.process_index)
  is_owner = [owner[block] == jax.process_index() for block in range(count)]
  return np.repeat(is_owner, rows // count)


def joined(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
  """Returns each row's values from the host that owns the row, on all hosts.

  Args:
    values: float64[B, N]; only rows in `mine` are used.
    mine: bool[B] of `rows_owned`.
  """
  if jax.process_count() == 1:
    return values
  # Values travel as bits, because JAX would round float64.
  bits = np.where(mine[:, None], values, 0.0).view(np.uint32)
  return np.bitwise_or.reduce(multihost_utils.process_allgather(bits), axis=0).view(np.float64)


def of_first(value: np.ndarray) -> np.ndarray:
  """Returns process 0's value, so that all hosts decide alike."""
  if jax.process_count() == 1:
    return np.asarray(value)
  return multihost_utils.broadcast_one_to_all(value)


def greatest(value: int) -> int:
  """Returns the greatest of all hosts' values."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def make_counter(mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
  """Makes `(batch, skipped, stop=False) -> counts`, which sums over all hosts without waiting.

  batch: global arrays; skipped: int32[B], examples left out of each row; stop: whether this host
  was asked to stop. counts: int32[] each, `tokens` (without padding), `examples`, `bad_records`,
  and `stop`, above 0 if any host was asked to stop.
  """
  per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  @functools.cache
  def flags(stop: bool) -> jax.Array:
    """Returns int32[D], this host's flag on each of its devices."""
    fill = lambda index: np.full(1, stop, np.int32)  # noqa: E731
    return jax.make_array_from_callback((mesh.size,), per_device, fill)

  @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
  def count(segments, skipped, stop):
    return {
      "tokens": jnp.count_nonzero(segments),
      "examples": jnp.sum(jnp.max(segments, 1)),
      "bad_records": jnp.sum(skipped),
      "stop": jnp.sum(stop),
    }

  return lambda batch, skipped, stop=False: count(batch["segments"], skipped, flags(stop))


def check_same(name: str, value: str, fix: str) -> None:
  """Raises InputError on every host if hosts have different values.

  Args:
    name: of the value, for the message.
    value: this host's.
    fix: what to do if values differ, for the message.
  """
  if jax.process_count() == 1:
    return
  checksums = multihost_utils.process_allgather(np.uint32(zlib.crc32(value.encode())))
  differing = np.flatnonzero(checksums != checksums[0])
  if len(differing):
    hosts = ", ".join(map(str, differing[:10])) + (", ..." if len(differing) > 10 else "")
    raise InputError(f"process {hosts} and process 0 differ in {name}; {fix}")
