"""Prints how many bytes this process reads to place a parameter; processes of test_shards."""

import json
import os
import sys

import jax
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlalign_jax import cli
from vlalign_jax.weights import names, shards, tensors

_FILE = flags.DEFINE_string("file", None, "Safetensors with w.0 to w.3.")
_SPECS = {"rows": (None, "x"), "columns": (None, None, "x"), "layers": ("x",), "all": ()}


def main(_):
  counts = []
  preadv = os.preadv

  def counting(file, buffers, offset):
    count = preadv(file, buffers, offset)
    counts.append(count)
    return count

  tensors.os.preadv = counting
  found = tensors.read_headers(_FILE.value, str)
  found = [found[f"w.{layer}"] for layer in range(4)]
  shape = (4, *found[0].shape)
  mesh = Mesh(jax.devices()[::4], ("x",))  # one device of each process
  read = {}
  with shards.readers() as pool:
    for case, spec in _SPECS.items():
      counts.clear()
      place = NamedSharding(mesh, PartitionSpec(*spec))
      leaf = jax.ShapeDtypeStruct(shape, "bfloat16")
      shards.place(names.Name("p", "w.{}"), found, leaf, place, 0, pool)
      read[case] = sum(counts)
  print(json.dumps(read), flush=True)


if __name__ == "__main__":
  sys.argv[0] = __file__
  cli.run(main, several_hosts=True)
