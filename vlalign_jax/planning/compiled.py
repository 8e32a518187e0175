"""A program compiled for devices that are not there: its bytes, operations and collectives."""

import dataclasses
import re
import time

import jax

from vlalign_jax.planning import collectives, hlo, operations
from vlalign_jax.planning.chips import GIB

_TOO_LARGE = re.compile(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program on one device.

  Attributes:
    seconds: that lowering and compiling took.
    total: bytes that the program takes at its peak: arguments, temporaries and results.
    arguments: bytes of what the step is given and gives back in the same place.
    temporaries: bytes of everything else; 0, as all below, where the program is refused.
    traffic: collectives by kind.
    flops: operations that the device runs.
    bytes_accessed: between the device's memory and its cores.
    kernels: calls of attention kernels.
    refused: the compiler's words where the program is larger than the device; else empty.
  """

  seconds: float
  total: float
  arguments: float = 0.0
  temporaries: float = 0.0
  traffic: dict[str, collectives.Traffic] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  bytes_accessed: float = 0.0
  kernels: int = 0
  refused: str = ""

  @property
  def sent(self) -> float:
    """Bytes that the device sends to others."""
    return sum(kind.bytes for kind in self.traffic.values())


def compile_program(lower, devices: int, platform: str, unknown: hlo.Trips) -> Compiled:
  """Compiles a program.

  Args:
    lower: () -> what `jax.jit(...).lower(...)` gives.
    devices: of the mesh.
    platform: tpu, gpu or cpu.
    unknown: how often loops run whose count depends on data.
  """
  start = time.monotonic()
  try:
    done = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    too_large = _TOO_LARGE.search(str(error))
    if too_large is None:
      raise
    needed = float(too_large.group(1)) * GIB
    return Compiled(time.monotonic() - start, needed, refused=str(error).splitlines()[0])
  seconds = time.monotonic() - start
  memory = done.memory_analysis()
  if platform == "tpu":
    # By this a program is refused. The sum of its temporaries is more: not all are there at a time.
    total = memory.peak_memory_in_bytes
  else:
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
  program = hlo.parse(done.as_text())
  return Compiled(
    seconds=seconds,
    total=total,
    arguments=memory.argument_size_in_bytes,
    temporaries=total - memory.argument_size_in_bytes,
    traffic=collectives.traffic(program, devices, unknown),
    flops=operations.flops(program, unknown),
    bytes_accessed=operations.bytes_accessed(program, unknown),
    kernels=operations.kernels(program, unknown),
  )
