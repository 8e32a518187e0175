"""What accelerators can do, by their makers' documentation, and how XLA describes GPUs."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX sees it.

  Attributes:
    name: shown in reports.
    memory: bytes of HBM that a program can have. TPUs: as libtpu's compiler reports when it refuses
      a larger one; GPUs: the three quarters that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
    flops: dense bfloat16 operations a second; None for CPUs, which differ too much.
    bandwidth: bytes a second between HBM and the cores.
    interconnect: bytes a second that a chip sends to its neighbors over all links.
  """

  name: str
  memory: float
  flops: float | None = None
  bandwidth: float | None = None
  interconnect: float | None = None


# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, "Key specifications", whose interconnect is in Gbit/s
# one way (v5e: 1600) or in bytes of both directions (v5p: 1200 GB/s).
TPUS = {
  "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1200e9, 300e9),
  "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
  "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
  "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 400e9),
}
# NVIDIA's data sheets of the SXM modules, whose NVLink number is the sum of both directions.
GPUS = {
  "a100": Chip("A100 80 GB", 0.75 * 80 * GIB, 312e12, 2039e9, 300e9),
  "a100-40gb": Chip("A100 40 GB", 0.75 * 40 * GIB, 312e12, 1555e9, 300e9),
  "h100": Chip("H100 80 GB", 0.75 * 80 * GIB, 989e12, 3350e9, 450e9),
  "h200": Chip("H200 141 GB", 0.75 * 141e9, 989e12, 4800e9, 450e9),
}
# NVLink ends at a node; beyond it a GPU has a 400 Gbit/s port (DGX H100), in bytes a second.
NVLINK_GPUS, NETWORK = 8, 50e9
# Slices that Google offers of two-dimensional chips; those of three have hosts of 2 x 2 x 1 chips.
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
LONGEST_AXIS = 24  # of a pod, in chips

# The numbers in which GPUs differ, as openxla/xla lists them in gpu/target_config/specs.
_AMPERE = """shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64
    l2_cache_size: 41943040 clock_rate_ghz: 1.41 shared_memory_per_block_optin: 166912"""
_HOPPER = """shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
    l2_cache_size: 52428800 clock_rate_ghz: 1.98 shared_memory_per_block_optin: 232448"""
# Name -> (XLA's name, compute capability, bytes of memory, bytes a second, the numbers).
_TARGETS = {
  "a100": ("NVIDIA A100-SXM4-80GB", 8, 85100068864, 2039040000000, _AMPERE),
  "a100-40gb": ("NVIDIA A100-SXM4-40GB", 8, 42331013120, 1555200000000, _AMPERE),
  "h100": ("NVIDIA H100 80GB HBM3", 9, 84929347584, 3352320000000, _HOPPER),
  "h200": ("NVIDIA H200 141GB HBM3e", 9, 151397597184, 4800000000000, _HOPPER),
}


# How JAX names a device -> its chip.
_KINDS = {
  "TPU v4": TPUS["v4"],
  "TPU v5 lite": TPUS["v5e"],
  "TPU v5e": TPUS["v5e"],
  "TPU v5": TPUS["v5p"],
  "TPU v5p": TPUS["v5p"],
  "TPU v6 lite": TPUS["v6e"],
  "TPU v6e": TPUS["v6e"],
  "NVIDIA A100-SXM4-80GB": GPUS["a100"],
  "NVIDIA A100-SXM4-40GB": GPUS["a100-40gb"],
  "NVIDIA H100 80GB HBM3": GPUS["h100"],
  "NVIDIA H200": GPUS["h200"],
  "NVIDIA H200 141GB HBM3e": GPUS["h200"],
}


def of_device(kind: str) -> Chip | None:
  """Returns the chip of a device by its `device_kind`; None if it is not known."""
  return _KINDS.get(kind)


def gpu_target(name: str) -> str:
  """Returns a GPU's description for XLA: the text of a GpuTargetConfigProto."""
  description, capability, memory, bandwidth, numbers = _TARGETS[name]
  return f"""gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
    shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    device_memory_size: {memory} memory_bandwidth: {bandwidth} {numbers}
    cuda_compute_capability {{ major: {capability} }}
  }}
  platform_name: "CUDA" device_description_str: "{description}"
  runtime_version {{ major: 12 minor: 8 patch: 0 }} dnn_version_info {{ major: 9 minor: 8 }}"""
