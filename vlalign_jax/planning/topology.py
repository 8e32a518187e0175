"""The devices that `--topology` names; none of them needs to exist."""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from vlalign_jax.errors import InputError
from vlalign_jax.sharding import chips

KNOWN = (
  f"TPU slices ({', '.join(chips.TPUS)}) such as v5e:4x4 or v5p:2x2x4, "
  f"GPUs ({', '.join(chips.GPUS)}) such as gpu:h100x8, CPUs such as cpu:8"
)
INSTALL_LIBTPU = "pip install -r requirements-tpu.txt"
INSTALL_CUDA = "pip install --no-deps -r requirements-gpu-plan.txt"
# Keeps libtpu from asking the metadata server of a TPU VM.
_NO_TPU_ATTACHED = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # next to another plan, or training
  "TPU_WORKER_ID": "0",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to plan for.

  Attributes:
    name: the value of `--topology`.
    chip: what each device can do.
    devices: to build a mesh from, and to compile for.
    note: what differs from a run on such devices; empty: nothing.
  """

  name: str
  chip: chips.Chip
  devices: tuple
  note: str = ""

  @property
  def kind(self) -> str:
    """Returns tpu, gpu or cpu."""
    kind = self.name.partition(":")[0]
    return "tpu" if kind in chips.TPUS else kind


def stay_on_host() -> None:
  """Keeps JAX away from attached accelerators; call it before anything else of JAX."""
  jax.config.update("jax_platforms", "cpu")


def open_topology(name: str) -> Topology:
  """Returns the devices that a name stands for.

  Raises:
    InputError: there are no such devices, or their compiler is not installed; says what to do.
  """
  kind, _, shape = name.partition(":")
  if kind in chips.TPUS:
    return _tpu(name, kind, shape)
  if kind == "gpu":
    return _gpu(name, shape)
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
    count = int(shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return Topology(name, chips.Chip("CPU", memory), _host_devices(count))
  raise _unknown(name)


def _unknown(name: str) -> InputError:
  return InputError(f"--topology={name}: no devices known by that name; there are {KNOWN}")


def _tpu(name: str, kind: str, shape: str) -> Topology:
  _check_slice(name, kind, shape)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--topology={name}: the compiler for TPUs is not installed; no TPU is needed for it: "
      f"{INSTALL_LIBTPU}"
    )
  for key, value in _NO_TPU_ATTACHED.items():
    os.environ.setdefault(key, value)
  options = {}
  if set(shape) <= {"1", "x"}:  # one chip of a host with several
    options["chips_per_host_bounds"] = [1, 1, 1]
  if kind == "v4":  # JAX shows its two cores as one device
    options["chip_config_name"] = "megacore"
  devices = _describe(name, "libtpu", platform="tpu", topology_name=name, **options)
  return Topology(name, chips.TPUS[kind], devices)


def _describe(name: str, compiler: str, **options) -> tuple:
  """Returns the devices that a compiler describes."""
  try:
    return tuple(topologies.get_topology_desc(**options).devices)
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())
    raise InputError(f"--topology={name}: {compiler} does not describe it: {reason}") from error


def _check_slice(name: str, kind: str, shape: str) -> None:
  """Refuses a name that is not a slice; libtpu's compiler would abort the process."""
  if chips.TORUS[kind] == 2:
    if shape not in chips.PLANES:
      raise InputError(
        f"--topology={name}: not a slice of {kind}; choose from {', '.join(chips.PLANES)}"
      )
    return
  sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[\dx]*\d", shape) else []
  full_hosts = len(sizes) == 3 and not sizes[0] % 2 and not sizes[1] % 2
  if not full_hosts or not 1 <= min(sizes) <= max(sizes) <= chips.LONGEST_AXIS:
    raise InputError(
      f"--topology={name}: not a slice of {kind}; hosts have 2x2x1 chips; write for example "
      f"{kind}:2x2x1 or {kind}:4x4x8, at most {chips.LONGEST_AXIS} along an axis"
    )


def _gpu(name: str, shape: str) -> Topology:
  match = re.fullmatch(r"([a-z0-9-]+?)x([1-9]\d*)", shape)
  if not match or match[1] not in chips.GPUS:
    raise _unknown(name)
  chip, count = chips.GPUS[match[1]], int(match[2])
  nodes, rest = divmod(count, chips.NVLINK_GPUS)
  if nodes and rest:
    raise InputError(f"--topology={name}: nodes have {chips.NVLINK_GPUS} GPUs; name a multiple")
  if not has_cuda_plugin():
    raise InputError(
      f"--topology={name}: the compiler for GPUs is not installed; no GPU is needed for it: "
      f"{INSTALL_CUDA}"
    )
  note = "without the card XLA does not time its kernels and may choose others than on it"
  if nodes > 1:
    chip = dataclasses.replace(chip, interconnect=chips.NETWORK)
    note += f"\nbetween nodes of {chips.NVLINK_GPUS} GPUs: {chips.NETWORK / 1e9:.0f} GB/s a GPU"
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  hosts = f"1x{nodes}x{chips.NVLINK_GPUS}" if nodes > 1 else f"1x1x{count}"
  target = chips.gpu_target(match[1])
  devices = _describe(name, "XLA", platform="cuda", target_config=target, topology=hosts)
  return Topology(name, chip, devices, note)


def has_cuda_plugin() -> bool:
  """Returns whether the compiler for GPUs is installed."""
  names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
  return bool(importlib.util.find_spec("jax_plugins")) and any(map(importlib.util.find_spec, names))


def _host_devices(count: int) -> tuple:
  """Returns virtual CPU devices.

  Raises:
    InputError: JAX has started with fewer of them.
  """
  if count > 1:
    with contextlib.suppress(RuntimeError):  # too late to ask for more; there may be enough
      jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise InputError(f"{count} CPU devices are wanted; JAX has started with {len(devices)}")
  return tuple(devices[:count])
