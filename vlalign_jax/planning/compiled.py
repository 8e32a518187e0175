"""A program compiled for devices that need not exist: its bytes, operations and collectives."""

import dataclasses
import re
import time

import jax

from vlalign_jax.hlo import collectives, memory, operations
from vlalign_jax.hlo.loops import Trips
from vlalign_jax.hlo.parser import parse
from vlalign_jax.sharding.chips import GIB

_TOO_LARGE = re.compile(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program on one device.

  Attributes:
    seconds: time of lowering and compiling.
    total: bytes at the program's peak: arguments, temporaries and results.
    arguments: bytes of the arguments, and of the results that take their place.
    temporaries: bytes of everything else; 0, as all below, if the program is refused.
    traffic: collectives by kind.
    flops: operations that the device runs.
    bytes_accessed: bytes between the device's memory and its cores.
    kernels: calls of attention kernels.
    refused: the compiler's message if the program is larger than the device; else empty.
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
    """Returns the bytes that the device sends to others."""
    return sum(kind.bytes for kind in self.traffic.values())


def compile_program(lower, devices: int, platform: str, unknown: Trips) -> Compiled:
  """Compiles a program.

  Args:
    lower: () -> the result of `jax.jit(...).lower(...)`.
    devices: number of devices of the mesh.
    platform: tpu, gpu or cpu.
    unknown: how often loops run whose count depends on data.
  """
  start = time.monotonic()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    too_large = _TOO_LARGE.search(str(error))
    if too_large is None:
      raise
    total = float(too_large[1]) * GIB
    return Compiled(time.monotonic() - start, total, refused=str(error).splitlines()[0])
  seconds = time.monotonic() - start
  sizes = compiled.memory_analysis()
  if platform == "tpu":
    # The compiler refuses a program by its peak; its temporaries are not all there at a time.
    total = sizes.peak_memory_in_bytes
  else:
    total = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    total += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  program = parse(compiled.as_text())
  return Compiled(
    seconds=seconds,
    total=total,
    arguments=sizes.argument_size_in_bytes,
    temporaries=total - sizes.argument_size_in_bytes,
    traffic=collectives.traffic(program, devices, unknown),
    flops=operations.flops(program, unknown),
    bytes_accessed=memory.bytes_accessed(program, unknown),
    kernels=operations.kernels(program, unknown),
  )
