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
    total: bytes that the program takes: arguments, results and temporaries.
    arguments: bytes of what the step is given and gives back in the same place.
    temporaries: bytes of everything else. 0 where the program is refused: not told then.
    traffic: collectives by kind; empty where the program is refused.
    flops: operations that the device runs; 0 where the program is refused.
    counted_once: operations by the compiler's own count, in which a loop's body counts once.
    refused: the compiler's words where the program is larger than the device; else empty.
  """

  seconds: float
  total: float
  arguments: float = 0.0
  temporaries: float = 0.0
  traffic: dict[str, collectives.Traffic] = dataclasses.field(default_factory=dict)
  flops: float = 0.0
  counted_once: float = 0.0
  refused: str = ""


def compile_step(program, rows, devices: int, head_trips: int) -> Compiled:
  """Compiles a program's train step.

  Args:
    program: `steps.program.Program`.
    rows: shapes of the batch.
    devices: of the mesh.
    head_trips: how often the loop of the output head runs at most; its count depends on data.
  """
  start = time.monotonic()
  lowered = program.train_step.lower(program.state, program.frozen, rows)
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
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + results
  text = hlo.parse(done.as_text())
  return Compiled(
    seconds=seconds,
    total=memory.argument_size_in_bytes + temporaries,
    arguments=memory.argument_size_in_bytes,
    temporaries=temporaries,
    traffic=collectives.traffic(text, devices, head_trips),
    flops=collectives.flops(text, head_trips),
    counted_once=(done.cost_analysis() or {}).get("flops", 0.0),
  )
