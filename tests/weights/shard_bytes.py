"""Places parameters of a file on the devices of two processes; test_shards runs it.

Prints one JSON object: the cases whose shards here differ from the file, the number of cases, and
the bytes that this process read of a parameter for each way to split it.
"""

import itertools
import json
import os
import sys

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from vlalign_jax import cli
from vlalign_jax.weights import names, shards, tensors

_FILE = flags.DEFINE_string("file", None, "Safetensors with w.0 to w.3.")
_SPLITS = {"rows": (None, "x"), "columns": (None, None, "x"), "layers": ("x",), "all": ()}
_STACKED = ((), (None, "a", "b"), (None, "b", "a"), (None, "b"), (None, None, "b"), ("a", "b"))
_VOCABULARY = ((), ("a", "b"), ("b", "a"), (None, ("a", "b")))
_NEW = 8


def _place(name, stored, expected, mesh, spec, dtype, pool):
  leaf = jax.ShapeDtypeStruct(expected.shape, dtype)
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return shards.place(name, stored, leaf, sharding, max(expected.shape), pool)


def _find_wrong(written, stored, pool) -> tuple[list, int]:
  """Returns (the cases with wrong values, the number of all cases)."""
  wrong, count = [], 0
  mean = written[0].mean(axis=0, dtype=np.float64).astype(written[0].dtype)
  longer = np.concatenate([written[0], np.broadcast_to(mean, (_NEW, *mean.shape))])
  arrays = {
    "same": (np.stack(written), stored, _STACKED),
    "transposed": (np.stack([value.T for value in written]), stored, _STACKED),
    "vocabulary": (longer, stored[:1], _VOCABULARY),
    "vocabulary_transposed": (longer.T, stored[:1], _VOCABULARY),
  }
  alternating = np.array(jax.devices()).reshape(2, 4).T.reshape(2, 4)
  orders = {"blocks": np.array(jax.devices()).reshape(2, 4), "alternating": alternating}
  for block, dtype, (order, devices) in itertools.product(
    (2**21, 100), ("bfloat16", "float32"), orders.items()
  ):
    shards._BLOCK = block
    mesh = Mesh(devices, ("a", "b"))
    for kind, (expected, tensors_of, specs) in arrays.items():
      name = names.Name("p", "w.{}" if kind in ("same", "transposed") else "w.0", kind)
      for spec in specs:
        count += 1
        param = _place(name, tensors_of, expected, mesh, spec, dtype, pool)
        for shard in param.addressable_shards:
          if not np.array_equal(np.asarray(shard.data), expected[shard.index].astype(dtype)):
            wrong.append([kind, spec, dtype, block, order])
  return wrong, count


def main(_):
  written = [load_file(_FILE.value)[f"w.{layer}"] for layer in range(4)]
  headers = tensors.read_headers(_FILE.value, str)
  stored = [headers[f"w.{layer}"] for layer in range(4)]
  counts, preadv = [], os.preadv

  def counting(file, buffers, offset):
    count = preadv(file, buffers, offset)
    counts.append(count)
    return count

  os.preadv = counting
  mesh = Mesh(jax.devices()[::4], ("x",))  # one device of each process
  read = {}
  with shards.readers() as pool:
    for case, spec in _SPLITS.items():
      counts.clear()
      _place(names.Name("p", "w.{}"), stored, np.stack(written), mesh, spec, "bfloat16", pool)
      read[case] = sum(counts)
    wrong, cases = _find_wrong(written, stored, pool)
  print(json.dumps({"wrong": wrong, "cases": cases, "read": read}), flush=True)


if __name__ == "__main__":
  sys.argv[0] = __file__
  cli.run(main, several_hosts=True)
