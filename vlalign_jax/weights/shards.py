"""Parameters from tensors in files into the shards that this host's devices hold.

A shard is read into host memory at the speed of the disk or the memory: layer by layer, a block of
rows by each of several threads, straight to its place. Nothing that no device here holds is read,
and what several hold is read once. On CPUs that memory is the array; other devices get a copy.
"""

import collections
import concurrent.futures
import math
import os
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Sharding

from vlalign_jax.weights import names

# Bytes that a thread reads at a time: few calls, and memory that stays in the processor's cache.
_BLOCK = 2**21
_ALIGNMENT = 64  # from which on JAX takes host memory as it is, on CPUs

_local = threading.local()


def readers() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that keep several reads in flight, also where there are few cores."""
  return concurrent.futures.ThreadPoolExecutor(max(4, min(16, os.cpu_count() or 1)))


def place(name: names.Name, tensors, leaf, sharding: Sharding, vocabulary: int, pool) -> jax.Array:
  """Reads a parameter into its shards.

  Args:
    name: of the parameter.
    tensors: those it is read from, one per layer if it is stacked.
    leaf: jax.ShapeDtypeStruct of the parameter.
    sharding: where it goes.
    vocabulary: V of the model. New tokens start as the mean of the old ones (Hewitt 2021): the
      model's distribution over the old vocabulary hardly changes.
    pool: of `readers`.

  Raises:
    InputError: a file cannot be read.
  """
  parts = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
  }
  buffers = {part: _empty([b - a for a, b in part], leaf.dtype) for part in parts.values()}
  # Those of one layer have no axis for layers; here all have one.
  stacked = {
    part if name.stacked else ((0, 1), *part): buffer if name.stacked else buffer[None]
    for part, buffer in buffers.items()
  }
  if _by_blocks(name, tensors[0]):
    jobs = _block_jobs(name, tensors, stacked, vocabulary)
  else:
    jobs = _layer_jobs(name, tensors, stacked)
  for job in [pool.submit(*job) for job in jobs]:
    job.result()
  arrays = [jax.device_put(buffers[part], device) for device, part in parts.items()]
  param = jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
  return jax.block_until_ready(param)  # so that the memory of one parameter is used at a time


def equal(first, second) -> bool:
  """Whether this process's share of the rows of two tensors is the same."""
  rows = first.shape[0]
  step = max(1, _BLOCK // max(1, math.prod(first.shape[1:])))
  for start in range(jax.process_index() * step, rows, jax.process_count() * step):
    part = start, min(start + step, rows)
    if not np.array_equal(first.read(part), second.read(part)):
      return False
  return True


def _empty(shape, dtype) -> np.ndarray:
  """An aligned array."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _by_blocks(name: names.Name, tensor) -> bool:
  """Whether rows of the tensor can be read by themselves: others are small, or in memory."""
  return name.kind != "patches" and len(tensor.shape) in (1, 2) and hasattr(tensor, "offset")


def _layer_jobs(name: names.Name, tensors, buffers) -> Iterator[tuple]:
  """(function, its arguments) that read whole tensors."""

  def read(layer):
    param = names.to_param(name.kind, tensors[layer].read())
    for ((first, stop), *part), buffer in buffers.items():
      if first <= layer < stop:
        buffer[layer - first] = param[tuple(slice(*axis) for axis in part)]

  return ((read, layer) for layer in range(len(tensors)))


def _block_jobs(name: names.Name, tensors, buffers, vocabulary: int) -> Iterator[tuple]:
  """(function, its arguments) that read blocks of rows, each once for all shards of these rows."""
  turned = name.kind.endswith("transposed")
  groups = collections.defaultdict(list)  # layers and rows -> shards, by their columns
  for (layers, *part), buffer in buffers.items():
    part = part[::-1] if turned else part
    columns = part[1] if len(part) > 1 else None
    target = buffer.swapaxes(1, 2) if turned else buffer  # as the tensors lie in their files
    groups[layers, part[0]].append((columns, target))
  for (layers, rows), members in groups.items():
    for columns, together in _joined(members):
      for layer in range(*layers):
        tensor = tensors[layer]
        targets = [(columns, target[layer - layers[0]]) for columns, target in together]
        known = min(rows[1], tensor.shape[0])  # fewer than the model's, if there are new tokens
        if rows[1] > known:
          yield _fill_new, tensor, columns, targets, max(rows[0], known) - rows[0]
        width = 1 if columns is None else columns[1] - columns[0]
        step = max(1, _BLOCK // (width * tensor.dtype.itemsize))
        for start in range(rows[0], known, step):
          block = start, min(start + step, known)
          yield _read_block, tensor, block, columns, targets, start - rows[0]


def _joined(members) -> Iterator[tuple]:
  """(columns, those of `members` within them), neighbors together."""
  members = sorted(members, key=lambda member: member[0] or (0, 0))
  together = []
  for columns, target in members:
    if together and together[-1][0][1] != columns[0]:
      yield (together[0][0][0], together[-1][0][1]), together
      together = []
    together.append((columns, target))
  first, last = together[0][0], together[-1][0]
  yield (first and (first[0], last[1])), together


def _scratch(shape, dtype) -> np.ndarray:
  """Memory of this thread, which the next call uses again."""
  size = math.prod(shape) * dtype.itemsize
  if len(getattr(_local, "memory", ())) < size:
    _local.memory = np.empty(size, np.uint8)
  return _local.memory[:size].view(dtype).reshape(shape)


def _read_block(tensor, rows, columns, targets, first: int) -> None:
  """Reads rows of a tensor into those of the targets, from `first` on."""
  count = rows[1] - rows[0]
  whole = targets[0][1][first : first + count]
  if len(targets) == 1 and whole.dtype == tensor.dtype and whole.flags.c_contiguous:
    tensor.read(rows, columns, whole)
    return
  shape = (count,) if columns is None else (count, columns[1] - columns[0])
  block = tensor.read(rows, columns, _scratch(shape, tensor.dtype))
  for part, target in targets:
    if part is not None and part != columns:
      _copy(target[first : first + count], block[:, part[0] - columns[0] : part[1] - columns[0]])
    else:
      _copy(target[first : first + count], block)


def read_whole(name: names.Name, tensor, vocabulary: int) -> np.ndarray:
  """Returns a tensor as it is stored, a vocabulary extended to the model's as `place` does it."""
  if not name.kind.startswith("vocabulary") or tensor.shape[0] >= vocabulary:
    return tensor.read()
  extended = np.empty((vocabulary, tensor.shape[1]), tensor.dtype)
  extended[: tensor.shape[0]] = tensor.read()
  columns = (0, tensor.shape[1])
  _fill_new(tensor, columns, [(columns, extended)], tensor.shape[0])
  return extended


def _fill_new(tensor, columns, targets, first: int) -> None:
  """Fills the targets' rows from `first` on with the mean of all rows of a tensor."""
  total, step = 0.0, max(1, _BLOCK // (math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
  for start in range(0, tensor.shape[0], step):
    block = tensor.read((start, min(start + step, tensor.shape[0])), columns)
    total += block.sum(axis=0, dtype=np.float64)
  mean = (total / tensor.shape[0]).astype(tensor.dtype)
  for part, target in targets:
    target[first:] = mean[part[0] - columns[0] : part[1] - columns[0]]


def _copy(target: np.ndarray, values: np.ndarray) -> None:
  if target.dtype == values.dtype and target.dtype.itemsize == 2:
    # numpy copies its own dtypes faster than those of others.
    target, values = target.view(np.uint16), values.view(np.uint16)
  target[...] = values
