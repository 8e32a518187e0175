"""What a compiled program moves between devices."""

import dataclasses
import math
import re

from vlalign_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective in a step.

  Attributes:
    count: operations that a device takes part in.
    bytes: that a device sends if each goes around a ring.
  """

  count: int = 0
  bytes: float = 0.0


def traffic(
  program: hlo.HloProgram, devices: int, unknown: hlo.Trips = hlo.ONCE
) -> dict[str, Traffic]:
  """Counts collectives by kind.

  A TPU program may gather in the steps of a product that uses what has arrived: its `collective-
  permute`s inside loops are gathers, or reductions with scattering, in small pieces.

  Args:
    program: from `hlo.parse`.
    devices: of the mesh.
    unknown: see `hlo.executed`.

  Returns:
    Kind -> Traffic, only of kinds that occur.
  """
  # A TPU's collective that runs beside products is cut over their fusions, all of one chain, and
  # runs as often as the one of them that runs least.
  chains: dict[str, tuple[int, str, float]] = {}
  for number, (instruction, computation, times) in enumerate(hlo.executed(program, unknown)):
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or not times:
      continue
    sent = _sent(kind, instruction, computation, devices)
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
      kind, sent = "reduce-scatter", sent / 2
    channel = re.search(r"channel_id=(\d+).*chain_id=", instruction.rest)
    key = f"{kind} {channel.group(1)}" if channel else f"{number}"
    if key not in chains or times < chains[key][0]:
      chains[key] = (times, kind, sent)
  totals: dict[str, Traffic] = {}
  for times, kind, sent in chains.values():
    if sent:
      of_kind = totals.setdefault(kind, Traffic())
      of_kind.count += times
      of_kind.bytes += times * sent
  return totals


def _sent(kind: str, instruction: hlo.Instruction, where: hlo.Computation, devices: int) -> float:
  """Returns the bytes that a device sends for one collective, in a ring over its group."""
  operands = sum(
    hlo.bytes_of(where.instructions[name].shape)
    for name in instruction.operands
    if name in where.instructions
  )
  size = _group_size(instruction, devices)
  if kind == "collective-permute":
    return operands if re.search(r"\{(\d+),(?!\1\})\d+\}", instruction.rest) else 0.0
  share = (size - 1) / size
  if kind == "all-gather":
    result = (
      operands * size if instruction.opcode.endswith("-start") else hlo.bytes_of(instruction.shape)
    )
    return result * share
  return operands * share * (2 if kind == "all-reduce" else 1)


def _group_size(instruction: hlo.Instruction, devices: int) -> int:
  """Returns how many devices a collective spans, from the three spellings of its groups."""
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", instruction.rest)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.rest)
  if counted:
    return int(counted.group(1))
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.rest)
  return len(listed.group(1).split(",")) if listed else devices
