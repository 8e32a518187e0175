"""Functions of `hosts`, on two processes of four CPU devices each; test_hosts starts them.

python -m tests.sharding.host_steps --coordinator=HOST:PORT --processes=2 --process=I

Process 0 writes one JSON object. Then process 1 ends with an error, while process 0 waits for it.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vlalign_jax import cli
from vlalign_jax.errors import InputError
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes

# Name -> (data, fsdp, tensor), order of the eight devices; the first four are process 0's.
MESHES = {
  "rows": ((2, 4, 1), range(8)),
  "alternating": ((8, 1, 1), (0, 4, 1, 5, 2, 6, 3, 7)),
  "tensor within a host": ((2, 1, 4), range(8)),
  "tensor over both hosts": ((2, 2, 2), (0, 4, 1, 5, 2, 6, 3, 7)),
  "tensor over all": ((1, 1, 8), range(8)),
}


def share(shape, order) -> dict:
  """Returns whether the functions of `hosts` are right for a batch of 16 rows over a mesh."""
  devices = np.array(jax.devices())[list(order)].reshape(shape)
  mesh = jax.sharding.Mesh(devices, meshes.AXES)
  mine = hosts.row_share(mesh)
  rng = np.random.default_rng(0)
  batch = {
    "segments": rng.integers(0, 4, (16, 5)).astype(np.int32),
    "images": rng.integers(0, 255, (16, 2, 3, 3, 3)).astype(np.uint8),
    "skipped": rng.integers(0, 2, 16).astype(np.int32),
  }
  blocks = {name: np.split(array, mine.count) for name, array in batch.items()}
  local = {
    name: np.concatenate([parts[block] for block in mine.blocks]) for name, parts in blocks.items()
  }
  arrays = hosts.to_device(mesh, local)
  same = {
    name: bool(np.array_equal(multihost_utils.process_allgather(arrays[name], tiled=True), array))
    for name, array in batch.items()
  }
  sums = hosts.make_counter(mesh)(arrays, arrays["skipped"], jax.process_index() == 1)
  counts = {name: int(value) for name, value in jax.device_get(sums).items()}
  expected = {
    "tokens": int(np.count_nonzero(batch["segments"])),
    "examples": int(batch["segments"].max(1).sum()),
    "bad_records": int(batch["skipped"].sum()),
    "stop": 4,  # the devices of process 1
  }
  # Each row comes from the host that owns it, float64 and nan bit for bit.
  values = rng.normal(size=(16, 3))
  values[3, 1] = np.nan
  owned = hosts.rows_owned(mesh, 16)
  joined = hosts.joined(np.where(owned[:, None], values, -1.0), owned)
  fetched = hosts.fetch(hosts.whole_to_device(mesh, batch))
  here = hosts.rows_here(mesh, 16)
  agreed = [
    values.tobytes() == joined.tobytes(),
    all(np.array_equal(fetched[name], array) for name, array in batch.items()),
    np.array_equal(batch["segments"][here], local["segments"]),
    set(np.flatnonzero(owned)) <= set(here),
  ]
  return {
    "blocks": mine.blocks,
    "same": all(same.values()),
    "counts": counts == expected,
    "agreed": all(agreed),
  }


def main(_):
  results = {name: share(*mesh) for name, mesh in MESHES.items()}
  hosts.check_same("what is the same", "x", "")
  number = jax.process_index() + 3
  results["decided"] = [float(hosts.of_first(np.float32(number))), hosts.greatest(number)]
  try:
    hosts.check_same("the seed", str(jax.process_index()), "give both the same")
  except InputError as error:
    results["differ"] = str(error)
  if jax.process_index() == 1:
    raise InputError("the disk of this host is full")
  results["make_mesh"] = dict(
    meshes.make_mesh(ConfigDict({"data": -1, "fsdp": 4, "tensor": 1})).shape
  )
  print(json.dumps(results), flush=True)
  multihost_utils.sync_global_devices("never")


if __name__ == "__main__":
  sys.argv[0] = __file__
  cli.run(main, several_hosts=True)
