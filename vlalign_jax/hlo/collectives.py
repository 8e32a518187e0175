"""The bytes that a compiled program moves between devices."""

import dataclasses
import math
import re

from vlalign_jax.hlo.loops import ONCE, Trips, executed
from vlalign_jax.hlo.parser import Computation, HloProgram, Instruction, bytes_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Traffic:
  """How often a device takes part in one kind of collective, and the bytes that it sends."""

  count: int = 0
  bytes: float = 0.0


def traffic(program: HloProgram, devices: int, unknown: Trips = ONCE) -> dict[str, Traffic]:
  """Counts collectives by kind; kinds that do not occur are left out.

  A TPU may gather an operand piece by piece while a product uses the pieces that have arrived: its
  collective-permutes inside loops are such gathers, or reductions with scattering.

  Args:
    program: from `parser.parse`.
    devices: of the mesh.
    unknown: how often loops run whose count depends on data.
  """
  # A TPU cuts a collective that overlaps with products over their fusions, all of one chain. It
  # runs as often as the fusion that runs least.
  chains: dict[str, tuple[int, str, float]] = {}
  for number, (instruction, computation, times) in enumerate(executed(program, unknown)):
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or not times:
      continue
    sent = _sent(kind, instruction, computation, devices)
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
      kind, sent = "reduce-scatter", sent / 2
    channel = re.search(r"channel_id=(\d+).*chain_id=", instruction.rest)
    key = f"{kind} {channel[1]}" if channel else f"{number}"
    if key not in chains or times < chains[key][0]:
      chains[key] = (times, kind, sent)
  totals: dict[str, Traffic] = {}
  for times, kind, sent in chains.values():
    if sent:
      total = totals.setdefault(kind, Traffic())
      total.count += times
      total.bytes += times * sent
  return totals


def _sent(kind: str, instruction: Instruction, computation: Computation, devices: int) -> float:
  """Returns the bytes that a device sends for one collective, in a ring over its group."""
  instructions = computation.instructions
  size = sum(bytes_of(instructions[x].shape) for x in instruction.operands if x in instructions)
  if kind == "collective-permute":  # unless every device sends to itself
    return size if re.search(r"\{(\d+),(?!\1\})\d+\}", instruction.rest) else 0.0
  group = _group_size(instruction.rest, devices)
  if kind == "all-gather":
    started = instruction.opcode.endswith("-start")
    size = size * group if started else bytes_of(instruction.shape)
  return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _group_size(rest: str, devices: int) -> int:
  """Returns how many devices a collective spans, from the three spellings of its groups."""
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
    return int(counted[1])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  return len(listed[1].split(",")) if listed else devices
