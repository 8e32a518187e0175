"""What a compiled program moves between devices, and the products that it computes."""

import dataclasses
import math
import re

import numpy as np

from vlalign_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}


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
  program: hlo.Program, devices: int, unknown: hlo.Trips = hlo.ONCE
) -> dict[str, Traffic]:
  """Collectives by kind.

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
  found: dict[str, Traffic] = {}
  for times, kind, sent in chains.values():
    if sent:
      total = found.setdefault(kind, Traffic())
      total.count += times
      total.bytes += times * sent
  return found


def _bytes(shape: str) -> float:
  return sum(
    math.prod(sizes) * _BITS.get(dtype, int("".join(re.findall(r"^\D+(\d+)", dtype)) or 8)) / 8
    for dtype, sizes in hlo.arrays(shape)
  )


def _sent(kind: str, instruction: hlo.Instruction, where: hlo.Computation, devices: int) -> float:
  """Bytes that a device sends for one collective, in a ring over its group."""
  given = sum(
    _bytes(where.instructions[name].shape)
    for name in instruction.operands
    if name in where.instructions
  )
  size = _group_size(instruction, devices)
  if kind == "collective-permute":
    return given if re.search(r"\{(\d+),(?!\1\})\d+\}", instruction.rest) else 0.0
  share = (size - 1) / size
  if kind == "all-gather":
    whole = given * size if instruction.opcode.endswith("-start") else _bytes(instruction.shape)
    return whole * share
  return given * share * (2 if kind == "all-reduce" else 1)


def _group_size(instruction: hlo.Instruction, devices: int) -> int:
  """Over how many devices a collective goes, from the three spellings of its groups."""
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


def flops(program: hlo.Program, unknown: hlo.Trips = hlo.ONCE) -> float:
  """Operations of all matrix products and convolutions that one device runs."""
  total = 0.0
  for instruction, computation, times in hlo.executed(program, unknown):
    if instruction.opcode in ("dot", "convolution"):
      count = _dot if instruction.opcode == "dot" else _convolution
      total += times * count(instruction, computation)
  return total


def kernels(program: hlo.Program, unknown: hlo.Trips = hlo.ONCE) -> int:
  """How often a device calls hand-written kernels (Pallas), whose operations `flops` cannot see."""
  targets = ("tpu_custom_call", "__gpu$xla.gpu.triton")
  return sum(
    times
    for instruction, _, times in hlo.executed(program, unknown)
    if instruction.opcode == "custom-call"
    and any(f'custom_call_target="{target}"' in instruction.rest for target in targets)
  )


def _sizes(name: str, where: hlo.Computation) -> tuple[int, ...]:
  return hlo.arrays(where.instructions[name].shape)[0][1]


def _dot(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  left = _sizes(instruction.operands[0], where)
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
  axes = [int(n) for n in contracted.group(1).split(",") if n] if contracted else []
  output = hlo.arrays(instruction.shape)[0][1]
  return 2.0 * math.prod(output) * math.prod(left[axis] for axis in axes)


def _convolution(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  """Products of a TPU program are convolutions, batches of them with dilated windows."""
  left, kernel = (_sizes(name, where) for name in instruction.operands[:2])
  output = hlo.arrays(instruction.shape)[0][1]
  inputs, kernels, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
  total = 2.0 * output[outputs.index("b")] * output[outputs.index("f")]
  total *= kernel[kernels.index("i")]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction)))
  for axis in range(len(left) - 2):
    label = str(axis)
    total *= _hits(
      left[inputs.index(label)],
      kernel[kernels.index(label)],
      output[outputs.index(label)],
      {key: value.split("x")[axis] for key, value in window.items()},
    )
  return total


def _window(instruction: hlo.Instruction) -> str:
  found = re.search(r"window=\{([^}]*)\}", instruction.rest)
  return found.group(1) if found else ""


def _hits(length: int, kernel: int, output: int, window: dict[str, str]) -> int:
  """Pairs (output, kernel) of one dimension that meet an element, not padding or dilation."""
  low = int(window.get("pad", "0_0").split("_")[0])
  stride, left, right = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
  place = np.arange(output)[:, None] * stride - low + np.arange(kernel)[None, :] * right
  return int(np.count_nonzero((place >= 0) & (place % left == 0) & (place // left < length)))
