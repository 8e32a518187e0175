"""Reads tensors in files into the shards of this host's devices.

Several threads read blocks of rows, layer by layer, directly into the host memory of a shard. Data
that no device of this host holds is not read, and data that several devices hold is read once. On
CPUs the host memory becomes the array; other devices get a copy.
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

# Bytes that a thread reads at a time: few calls, and a block fits into the processor's cache.
_BLOCK = 2**21
_ALIGNMENT = 64  # with which JAX on CPUs uses host memory without a copy

_local = threading.local()


def readers() -> concurrent.futures.ThreadPoolExecutor:
  """Returns threads for reading; at least four, so that reads overlap on few cores as well."""
  return concurrent.futures.ThreadPoolExecutor(max(4, min(16, os.cpu_count() or 1)))


def place(name: names.Name, tensors, leaf, sharding: Sharding, vocabulary: int, pool) -> jax.Array:
  """Reads a parameter into its shards.

  Args:
    name: of the parameter.
    tensors: its tensors, one per layer if it is stacked.
    leaf: jax.ShapeDtypeStruct of the parameter.
    sharding: of the parameter.
    vocabulary: V of the model. New tokens start as the mean of the old ones (Hewitt 2021), which
      hardly changes the model's distribution over the old vocabulary.
    pool: from `readers`.

  Raises:
    InputError: a file cannot be read.
  """
  parts = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    if index is not None
    if index is not None
  }
  buffers = {part: _empty([b - a for a, b in part], leaf.dtype) for part in parts.values()}
  # Adds an axis for layers to parameters that are not stacked.
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
  return jax.block_until_ready(param)  # so that host memory holds one parameter at a time


def equal(first, second) -> bool:
  """Returns whether two tensors are equal in this process's share of their rows."""
  num_rows = first.shape[0]
  step = max(1, _BLOCK // max(1, math.prod(first.shape[1:])))
  for start in range(jax.process_index() * step, num_rows, jax.process_count() * step):
    rows = start, min(start + step, num_rows)
    if not np.array_equal(first.read(rows), second.read(rows)):
      return False
  return True


def _empty(shape, dtype) -> np.ndarray:
  """Returns an uninitialized array that is aligned for JAX."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _by_blocks(name: names.Name, tensor) -> bool:
  """Returns whether blocks of rows can be read; other tensors are small, or not in a file."""
  return name.kind != "patches" and len(tensor.shape) in (1, 2) and hasattr(tensor, "offset")


def _layer_jobs(name: names.Name, tensors, buffers) -> Iterator[tuple]:
  """Yields (function, arguments) of calls that read one full tensor each."""

  def read(layer):
    param = names.to_param(name.kind, tensors[layer].read())
    for ((first, stop), *part), buffer in buffers.items():
      if first <= layer < stop:
        buffer[layer - first] = param[tuple(slice(*axis) for axis in part)]

  return ((read, layer) for layer in range(len(tensors)))


def _block_jobs(name: names.Name, tensors, buffers, vocabulary: int) -> Iterator[tuple]:
  """Yields (function, arguments) of calls that read a block of rows each, for all its shards."""
  transposed = name.kind.endswith("transposed")
  groups = collections.defaultdict(list)  # (layers, rows) -> (columns, buffer) of the shards
  for (layers, *part), buffer in buffers.items():
    part = part[::-1] if transposed else part
    columns = part[1] if len(part) > 1 else None
    target = buffer.swapaxes(1, 2) if transposed else buffer  # with the axes of the tensors
    groups[layers, part[0]].append((columns, target))
  for (layers, rows), members in groups.items():
    for columns, neighbors in _join_neighbors(members):
      for layer in range(*layers):
        tensor = tensors[layer]
        targets = [(columns, target[layer - layers[0]]) for columns, target in neighbors]
        stop = min(rows[1], tensor.shape[0])  # the tensor lacks rows of new tokens
        if rows[1] > stop:
          yield _fill_new, tensor, columns, targets, max(rows[0], stop) - rows[0]
        width = 1 if columns is None else columns[1] - columns[0]
        step = max(1, _BLOCK // (width * tensor.dtype.itemsize))
        for start in range(rows[0], stop, step):
          block = start, min(start + step, stop)
          yield _read_block, tensor, block, columns, targets, start - rows[0]


def _join_neighbors(members) -> Iterator[tuple]:
  """Groups (columns, target) pairs by adjacent columns; yields (all columns, the group)."""
  members = sorted(members, key=lambda member: member[0] or (0, 0))
  group = []
  for columns, target in members:
    if group and group[-1][0][1] != columns[0]:
      yield (group[0][0][0], group[-1][0][1]), group
      group = []
    group.append((columns, target))
  first, last = group[0][0], group[-1][0]
  yield (first and (first[0], last[1])), group


def _scratch(shape, dtype) -> np.ndarray:
  """Returns uninitialized memory of this thread, which its next call uses again."""
  size = math.prod(shape) * dtype.itemsize
  if len(getattr(_local, "memory", ())) < size:
    _local.memory = np.empty(size, np.uint8)
  return _local.memory[:size].view(dtype).reshape(shape)


def _read_block(tensor, rows, columns, targets, first: int) -> None:
  """Reads rows of a tensor into the targets, where they start at row `first`."""
  num_rows = rows[1] - rows[0]
  out = targets[0][1][first : first + num_rows]
  if len(targets) == 1 and out.dtype == tensor.dtype and out.flags.c_contiguous:
    tensor.read(rows, columns, out)
    return
  shape = (num_rows,) if columns is None else (num_rows, columns[1] - columns[0])
  block = tensor.read(rows, columns, _scratch(shape, tensor.dtype))
  for part, target in targets:
    if part is not None and part != columns:
      _copy(target[first : first + num_rows], block[:, part[0] - columns[0] : part[1] - columns[0]])
    else:
      _copy(target[first : first + num_rows], block)


def read_tensor(name: names.Name, tensor, vocabulary: int) -> np.ndarray:
  """Reads a tensor in its dtype; extends a vocabulary to the model's, as `place` does."""
  if not name.kind.startswith("vocabulary") or tensor.shape[0] >= vocabulary:
    return tensor.read()
  extended = np.empty((vocabulary, tensor.shape[1]), tensor.dtype)
  extended[: tensor.shape[0]] = tensor.read()
  columns = (0, tensor.shape[1])
  _fill_new(tensor, columns, [(columns, extended)], tensor.shape[0])
  return extended


def _fill_new(tensor, columns, targets, first: int) -> None:
  """Fills the targets' rows from `first` to the end with the mean of all rows of a tensor."""
  total, step = 0.0, max(1, _BLOCK // (math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
  for start in range(0, tensor.shape[0], step):
    block = tensor.read((start, min(start + step, tensor.shape[0])), columns)
    total += block.sum(axis=0, dtype=np.float64)
  mean = (total / tensor.shape[0]).astype(tensor.dtype)
  for part, target in targets:
    target[first:] = mean[part[0] - columns[0] : part[1] - columns[0]]


def _copy(target: np.ndarray, values: np.ndarray) -> None:
  if target.dtype == values.dtype and target.dtype.itemsize == 2:
    # numpy copies its own dtypes faster than bfloat16.
    target, values = target.view(np.uint16), values.view(np.uint16)
  target[...] = values
