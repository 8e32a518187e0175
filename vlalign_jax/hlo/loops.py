"""How often each instruction of a compiled program runs.

The compiler's own totals count the body of a loop once. Here it counts as often as the loop runs,
which follows from the start, the step and the limit of the loop's counter.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlalign_jax.hlo.parser import Computation, HloProgram, Instruction

# These return their first operand unchanged.
_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier")
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}


@dataclasses.dataclass(frozen=True)
class Trips:
  """How often, on average, loops run whose count depends on data.

  Attributes:
    to_unknown: loops with a known start.
    from_unknown: loops whose start depends on data.
    to_counter: loops up to the counter of the outer loop, or up to what it looks up in an array.
  """

  to_unknown: float = 1
  from_unknown: float = 1
  to_counter: float = 1


ONCE = Trips()


class _Element(NamedTuple):
  """An element of a loop's tuple plus a constant; index None: read from an array at an element."""

  index: Any  # int or None; `tuple.index` is a method, so that types do not fit
  offset: int = 0


_Value = int | _Element | None  # None: not known


class _Scope(NamedTuple):
  """A computation; known elements of its parameter tuple; values of a fusion's parameters."""

  program: HloProgram
  computation: Computation
  constants: Mapping[int, int] = {}
  arguments: list[_Value] | None = None

  def enter(self, name: str, constants: Mapping[int, int] | None = None) -> "_Scope":
    """Returns the scope of a computation that is called from this one."""
    return _Scope(self.program, self.program.computations[name], constants or {})

  def enter_fusion(self, fusion: Instruction) -> "_Scope":
    """Returns the scope of a fusion's computation."""
    arguments = [_value(self, operand) for operand in fusion.operands]
    return self.enter(fusion.attribute("calls"))._replace(arguments=arguments)

  def origin(self, name: str) -> Instruction | None:
    """Returns the instruction that computes a value, before copies of it."""
    instruction = self.computation.instructions.get(name)
    while instruction is not None and instruction.opcode in _COPIES:
      instruction = self.computation.instructions.get(instruction.operands[0])
    return instruction


def executed(
  program: HloProgram, unknown: Trips = ONCE
) -> Iterator[tuple[Instruction, Computation, int]]:
  """Yields (instruction, its computation, how often a run of the program executes it).

  Includes the instructions of fusions, of called computations and of all branches of conditionals.

  Args:
    program: from `parser.parse`.
    unknown: how often loops run whose count depends on data.
  """
  yield from _run(_Scope(program, program.computations[program.entry]), 1, unknown)


def _run(scope: _Scope, times: int, unknown: Trips):
  for instruction in scope.computation.instructions.values():
    yield instruction, scope.computation, times
    if instruction.opcode == "while":
      trips, constants = _count_trips(scope, instruction, unknown)
      body = scope.enter(instruction.attribute("body"), constants)
      yield from _run(body, round(times * trips), unknown)
    # The start of an asynchronous operation names what it calls, and so do its later parts.
    elif not instruction.opcode.endswith(("-update", "-done")):
      for name in instruction.called():
        yield from _run(scope.enter(name), times, unknown)


def _count_trips(scope: _Scope, loop: Instruction, unknown: Trips) -> tuple[float, dict[int, int]]:
  """Returns (how often a loop runs, index -> value of its elements that never change)."""
  starts, results = _elements(scope, loop.operands[0]), _results(scope, loop, {})
  constants = {
    index: start
    for index, start in starts.items()
    if isinstance(start, int) and results.get(index) == _Element(index)
  }
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known[1]), constants
  comparison = _comparison(scope.enter(loop.attribute("condition"), constants))
  if comparison is None:
    return unknown.to_unknown, constants
  counter, direction, limit = comparison
  start = starts.get(counter.index)
  # The step of the counter may be one of the constants.
  result = _results(scope, loop, constants).get(counter.index)
  if not isinstance(result, _Element) or result.index != counter.index or not result.offset:
    return unknown.to_unknown, constants
  if not isinstance(start, int):
    return unknown.from_unknown, constants
  if isinstance(limit, int):
    distance = limit - (start + counter.offset) + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, -(-distance // result.offset)), constants
  # The limit starts as an element of the outer loop.
  if isinstance(limit, _Element) and isinstance(starts.get(limit.index), _Element):
    return unknown.to_counter, constants
  return unknown.to_unknown, constants


def _results(scope: _Scope, loop: Instruction, constants: Mapping[int, int]) -> dict[int, _Value]:
  """Returns the elements of a loop's tuple after one turn."""
  body = scope.enter(loop.attribute("body"), constants)
  return _elements(body, body.computation.root.name)


def _comparison(scope: _Scope) -> tuple[_Element, str, _Value] | None:
  """Returns (counter, direction, limit) of a loop's condition; None if it is not of this form."""
  root = scope.computation.root
  if root.opcode == "fusion":
    scope = scope.enter_fusion(root)
    root = scope.computation.root
  if root.opcode != "compare":
    return None
  counter, limit = (_value(scope, name) for name in root.operands)
  direction = re.search(r"direction=(\w\w)", root.rest)[1]
  if not isinstance(counter, _Element):
    counter, limit, direction = limit, counter, _FLIPPED.get(direction, direction)
  return (
    (counter, direction, limit) if isinstance(counter, _Element) and direction != "EQ" else None
  )


def _elements(scope: _Scope, name: str) -> dict[int, _Value]:
  """Returns index -> value of a tuple's elements; empty if the computation does not build it."""
  instruction = scope.origin(name)
  if instruction.opcode != "tuple":
    return {}
  return {index: _value(scope, operand) for index, operand in enumerate(instruction.operands)}


def _value(scope: _Scope, name: str) -> _Value:
  """Returns the value of an integer instruction."""
  instruction = scope.origin(name)
  if instruction is None:
    return None
  operands = instruction.operands
  match instruction.opcode:
    case "constant":
      return int(operands[0]) if re.fullmatch(r"-?\d+", operands[0]) else None
    case "parameter" if scope.arguments is not None:
      return scope.arguments[int(operands[0])]
    case "get-tuple-element":
      source = scope.computation.instructions[operands[0]]
      index = int(re.search(r"index=(\d+)", instruction.rest)[1])
      if source.opcode == "parameter":
        return scope.constants.get(index, _Element(index))
      return _value(scope, source.operands[index]) if source.opcode == "tuple" else None
    case "fusion":
      fused = scope.enter_fusion(instruction)
      return _value(fused, fused.computation.root.name)
    case "dynamic-slice":
      indices = (_value(scope, index) for index in operands[1:])
      return _Element(None) if any(isinstance(index, _Element) for index in indices) else None
    case "add" | "subtract":
      first, second = (_value(scope, operand) for operand in operands)
      return _sum(first, second, -1 if instruction.opcode == "subtract" else 1)
  return None


def _sum(first: _Value, second: _Value, sign: int) -> _Value:
  if sign == 1 and isinstance(second, _Element):
    first, second = second, first
  if first is None or not isinstance(second, int):
    return None
  if isinstance(first, int):
    return first + sign * second
  return first._replace(offset=first.offset + sign * second)
