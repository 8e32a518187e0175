"""A step compiled for devices that are not there: its bytes, operations and collectives."""

import dataclasses
import re
import time

import jax

from vlalign_jax.planning import collectives, hlo
from vlalign_jax.planning.chips import GIB

_TOO_LARGE = re.compile(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program on one device.

  Attributes:
    seconds: that compiling took.
    total: bytes that the program takes at its peak: arguments, temporaries and results.
    arguments: bytes of what the step is given and gives back in the same place.
    temporaries: bytes of everything else. 0 where the program is refused: not told then.
    traffic: collectives by kind; empty where the program is refused.
    flops: operations that the device runs; 0 where the program is refused.
    kernels: calls of hand-written kernels, whose operations are not among `flops`.
    counted_once: operations by the compiler's own count, in which a loop's body counts once.
    refused: the compiler's words where the program is larger than the device; else empty.
  """

  seconds: float
  total: float
  arguments: float = 0.0
  temporaries: float = 0.0
  traffic: dict[str, collectives.Traffic] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  kernels: int = 0
  counted_once: float = 0.0
  refused: str = ""


def compile_lowered(lowered, devices: int, platform: str, unknown: hlo.Trips) -> Compiled:
  """Compiles a program.

  Args:
    lowered: what `jax.jit(...).lower(...)` gives.
    devices: of the mesh.
    platform: tpu or cpu.
    unknown: how often loops run whose count depends on data.
  """
  start = time.monotonic()
  try:
    done = lowered.compile()
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
  text = hlo.parse(done.as_text())
  return Compiled(
    seconds=seconds,
    total=total,
    arguments=memory.argument_size_in_bytes,
    temporaries=total - memory.argument_size_in_bytes,
    traffic=collectives.traffic(text, devices, unknown),
    flops=collectives.flops(text, unknown),
    kernels=collectives.kernels(text, unknown),
    counted_once=(done.cost_analysis() or {}).get("flops", 0.0),
  )
