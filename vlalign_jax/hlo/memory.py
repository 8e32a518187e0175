"""The bytes that a compiled program moves between a device's memory and its cores."""

import re
from collections.abc import Iterator

from vlalign_jax.hlo.loops import ONCE, Trips, executed
from vlalign_jax.hlo.parser import Computation, HloProgram, Instruction, bytes_of

# Instructions that move nothing themselves.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("call", "after-all", "opt-barrier", "iota", "partition-id", "replica-id", "async-start"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


def bytes_accessed(program: HloProgram, unknown: Trips = ONCE) -> float:
  """Counts bytes that one device reads from its memory and writes to it.

  An instruction reads its operands and writes its result; a fusion is one instruction. An array
  that is sliced, or updated in place, counts as much as the slice. An array that a TPU keeps in a
  core's own memory counts nothing. XLA counts in the same way, but a loop's body once.

  Args:
    program: from `parser.parse`.
    unknown: how often loops run whose count depends on data.
  """
  inside_fusions = {
    name
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode == "fusion"
    for name in instruction.called()
  }
  return sum(
    times * _moved(program, instruction, computation)
    for instruction, computation, times in executed(program, unknown)
    if computation.name not in inside_fusions
  )


def _moved(program: HloProgram, instruction: Instruction, computation: Computation) -> float:
  opcode, instructions = instruction.opcode, computation.instructions
  if opcode in _FREE or opcode.endswith(("-done", "-update")):
    return 0.0
  if opcode in ("copy-start", "slice-start"):  # its result names both places
    return _bytes(instruction)
  if opcode in _SLICES:
    return 2 * _bytes(instruction)
  if opcode in _UPDATES:
    return 2 * _bytes(instructions[instruction.operands[1 if opcode == _UPDATES[0] else -1]])
  sizes = [_bytes(instructions[x]) if x in instructions else 0.0 for x in instruction.operands]
  if opcode == "fusion":
    fused = program.computations[instruction.attribute("calls")]
    return _moved_by_fusion(program, fused, sizes)
  return sum(sizes) + _bytes(instruction)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
  """Returns name -> the instructions that take it."""
  users: dict[str, list[Instruction]] = {}
  for instruction in computation.instructions.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  return users


def _moved_by_fusion(program: HloProgram, fused: Computation, operands: list[float]) -> float:
  users = _users(fused)
  results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
  total = sum(_written(fused, name) for name in results)
  for instruction in fused.instructions.values():
    if instruction.opcode == "parameter":
      size = operands[int(instruction.operands[0])]
      reads = [size if read is None else read for read in _reads(program, instruction, users)]
      total += min(size, sum(reads)) if reads else size
  return total


def _reads(
  program: HloProgram, array: Instruction, users: dict[str, list[Instruction]]
) -> Iterator[float | None]:
  """Yields the bytes of an array that each user reads; None: all of them."""
  for user in users.get(array.name, ()):
    if user.opcode == "bitcast":
      yield from _reads(program, user, users)
    elif user.opcode == "fusion":  # a TPU's fusion of a product has one that slices its operand
      nested = program.computations[user.attribute("calls")]
      inner = _users(nested)
      for parameter in nested.instructions.values():
        is_input = parameter.opcode == "parameter"
        if is_input and user.operands[int(parameter.operands[0])] == array.name:
          yield from _reads(program, parameter, inner)
    elif user.opcode in _SLICES and user.operands[0] == array.name:
      yield _bytes(user)
    elif user.opcode in _UPDATES and user.operands[0] == array.name:
      yield 0.0  # it stays where it is
    else:
      yield None


def _written(fused: Computation, name: str) -> float:
  result = fused.instructions[name]
  while result.opcode == "bitcast":
    result = fused.instructions[result.operands[0]]
  in_place = result.opcode == "dynamic-update-slice"
  return _bytes(fused.instructions[result.operands[1]] if in_place else result)


def _bytes(instruction: Instruction) -> float:
  """Returns the bytes of a result in the device's memory, without arrays in a core's, S(1)."""
  return bytes_of(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}", "", instruction.shape))
