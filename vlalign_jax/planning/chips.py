"""What accelerators can do, from their makers' documentation."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX sees it.

  Attributes:
    name: for people.
    memory: bytes of HBM that a program can have. TPUs: as libtpu's compiler says where it refuses a
      larger one; GPUs: three quarters, what JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
    flops: bfloat16 operations a second, dense; None where no number holds for all of the kind.
    bandwidth: bytes a second between HBM and the cores.
    interconnect: bytes a second that a chip sends to its neighbours over all links.
  """

  name: str
  memory: float
  flops: float | None = None
  bandwidth: float | None = None
  interconnect: float | None = None


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "Key specifications"; interconnect is given there as
# Gbit/s one way (v5e: 1600) or as bidirectional bytes (v5p: 1200 GB/s).
TPUS = {
  "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1200e9, 300e9),
  "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
  "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
  "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 400e9),
}
# NVIDIA's data sheets of the SXM modules; NVLink's number there is the sum of both directions.
GPUS = {
  "a100": Chip("A100 80 GB", 0.75 * 80 * GIB, 312e12, 2039e9, 300e9),
  "a100-40gb": Chip("A100 40 GB", 0.75 * 40 * GIB, 312e12, 1555e9, 300e9),
  "h100": Chip("H100 80 GB", 0.75 * 80 * GIB, 989e12, 3350e9, 450e9),
  "h200": Chip("H200 141 GB", 0.75 * 141e9, 989e12, 4800e9, 450e9),
}
# NVLink ends at a node; beyond it a GPU has a 400 Gbit/s port (DGX H100), in bytes a second.
NVLINK_GPUS, NETWORK = 8, 50e9
# Slices that Google offers: listed for the chips in a plane; in space, hosts of 2 x 2 x 1 chips.
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# At this many chips along an axis a pod ends.
LONGEST_AXIS = 24
