"""What the hosts of a run share out and agree on: rows, counts, and being the same run."""

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
    blocks: numbers of the blocks, ascending; where `tensor` spans hosts, several have the same.
    count: how many blocks there are in all.
  """

  blocks: tuple[int, ...]
  count: int


def row_share(mesh: Mesh) -> RowShare:
  """The rows that the devices of this host hold, wherever in the mesh they stand."""
  count = meshes.row_blocks(mesh)
  held = meshes.batch_sharding(mesh).addressable_devices_indices_map((count,))
  blocks = {block for index in held.values() if index for block in range(*index[0].indices(count))}
  return RowShare(tuple(sorted(blocks)), count)


def to_device(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A batch as global arrays over the mesh.

  Args:
    mesh: the mesh.
    batch: arrays whose first axis is this host's rows: those of `row_share(mesh).blocks`, one
      block after the other.
  """
  share, sharding = row_share(mesh), meshes.batch_sharding(mesh)

  def place(array: np.ndarray) -> jax.Array:
    rows = len(array) // len(share.blocks)
    first = {block * rows: place * rows for place, block in enumerate(share.blocks)}

    def part(index) -> np.ndarray:
      begin, _, _ = index[0].indices(rows * share.count)
      return array[first[begin] : first[begin] + rows]

    shape = (rows * share.count, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(array) for name, array in batch.items()}


def whole_to_device(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """As `to_device`, of arrays that have the rows of all hosts, alike on each."""
  sharding = meshes.batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    for name, array in batch.items()
  }


def fetch(arrays):
  """A tree of arrays over the mesh as whole arrays of this host; all hosts call it together."""
  if jax.process_count() == 1:
    return jax.device_get(arrays)
  return multihost_utils.process_allgather(arrays, tiled=True)


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
  """int[b], which of a batch's rows this host makes, in the order of `to_device`."""
  share = row_share(mesh)
  per_block = rows // share.count
  return (np.array(share.blocks)[:, None] * per_block + np.arange(per_block)).reshape(-1)


def rows_owned(mesh: Mesh, rows: int) -> np.ndarray:
  """bool[rows], true for those that this host answers for: the first of the hosts that hold one."""
  count, owner = meshes.row_blocks(mesh), {}
  for device, (index,) in meshes.batch_sharding(mesh).devices_indices_map((count,)).items():
    for block in range(*index.indices(count)):
      owner[block] = min(owner.get(block, device.process_index), device.process_index)
  mine = [owner[block] == jax.process_index() for block in range(count)]
  return np.repeat(mine, rows // count)


def joined(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
  """Rows from the hosts that answer for them, on all hosts.

  Args:
    values: float64[B, N]; only rows of `mine` count.
    mine: bool[B] of `rows_owned`.
  """
  if jax.process_count() == 1:
    return values
  # As bits, exactly: JAX would round float64.
  bits = np.where(mine[:, None], values, 0.0).view(np.uint32)
  return np.bitwise_or.reduce(multihost_utils.process_allgather(bits), axis=0).view(np.float64)


def of_first(value: np.ndarray) -> np.ndarray:
  """What process 0 has: a decision that hosts take from their own copies of a number."""
  if jax.process_count() == 1:
    return np.asarray(value)
  return multihost_utils.broadcast_one_to_all(value)


def greatest(value: int) -> int:
  """The greatest of all hosts' values."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def make_counter(mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
  """`(rows, skipped, stop=False) -> counts` over all hosts, which nothing waits for.

  rows: the global arrays of a batch; skipped: int32[B], examples left out of each row; stop:
  whether this host was asked to stop. counts: int32[] each, `tokens` (padding not counted),
  `examples`, `bad_records`, and `stop`, above 0 if any host was asked to.
  """
  one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  @functools.cache
  def flags(stop: bool) -> jax.Array:
    """int32[D], this host's answer on each of its devices."""
    part = lambda index: np.full(1, stop, np.int32)  # noqa: E731
    return jax.make_array_from_callback((mesh.size,), one_each, part)

  @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
  def count(segments, skipped, stop):
    return {
      "tokens": jnp.count_nonzero(segments),
      "examples": jnp.sum(jnp.max(segments, 1)),
      "bad_records": jnp.sum(skipped),
      "stop": jnp.sum(stop),
    }

  return lambda rows, skipped, stop=False: count(rows["segments"], skipped, flags(stop))


def check_same(name: str, value: str, mend: str) -> None:
  """Refuses a run whose hosts differ in something that must be the same on all.

  Args:
    name: what it is, for the message.
    value: this host's.
    mend: what to do if others have another.

  Raises:
    InputError: on every host.
  """
  if jax.process_count() == 1:
    return
  mine = np.uint32(zlib.crc32(value.encode()))
  all_values = multihost_utils.process_allgather(mine)
  differing = np.flatnonzero(all_values != all_values[0])
  if len(differing):
    hosts = ", ".join(map(str, differing[:10])) + (", ..." if len(differing) > 10 else "")
    raise InputError(f"process {hosts} and process 0 differ in {name}; {mend}")
