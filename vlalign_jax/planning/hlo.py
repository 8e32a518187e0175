"""The text of a compiled program, as far as counting needs it: what runs, and how often.

The compiler's own totals count the body of a loop once. Here a loop's body counts as often as it
runs, found from the bounds and the step of its counter.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(
  r"\b(?:calls|body|condition|true_computation|false_computation|branch_computations|"
  r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}
# These return their first operand unchanged.
_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; `shape` is the text of its type, `rest` what follows operands."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, the last of which is marked as its root."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction


@dataclasses.dataclass(frozen=True)
class Trips:
  """How often loops run whose count depends on data, on average.

  Attributes:
    to_unknown: with a known start.
    from_unknown: with none.
    to_counter: with a limit that the counter of the loop around it says.
  """

  to_unknown: float = 1
  from_unknown: float = 1
  to_counter: float = 1


ONCE = Trips()


@dataclasses.dataclass(frozen=True)
class HloProgram:
  """Computations by name."""

  computations: dict[str, Computation]
  entry: str


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns (dtype, sizes) of all arrays in the text of a type."""
  return [
    (dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(shape)
  ]


def bytes_of(shape: str) -> float:
  """Returns the bytes of all arrays in the text of a type."""
  return sum(
    math.prod(sizes) * _BITS.get(dtype, int("".join(re.findall(r"^\D+(\d+)", dtype)) or 8)) / 8
    for dtype, sizes in arrays(shape)
  )


def parse(text: str) -> HloProgram:
  """Reads what `compiled.as_text()` gives.

  Raises:
    ValueError: it is not the text of a program.
  """
  computations, entry, name, instructions, root = {}, None, None, {}, None
  for line in text.splitlines():
    if name is None:
      header = _HEADER.match(line)
      if header:
        name, instructions, root = header.group(2), {}, None
        entry = name if header.group(1) else entry
    elif line.rstrip() == "}":
      computations[name] = Computation(name, instructions, root)
      name = None
    else:
      instruction = _instruction(line)
      if instruction is not None:
        instructions[instruction.name] = instruction
        root = instruction if line.lstrip().startswith("ROOT ") else root
  if entry is None:
    raise ValueError("no entry computation: not the text of a compiled program")
  return HloProgram(computations, entry)


def _instruction(line: str) -> Instruction | None:
  found = _NAME.match(line)
  if not found:
    return None
  rest = line[found.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest, 0) - 1
  given = rest[:end]
  operands = tuple(re.findall(r"%([\w.\-]+)", given)) or (given,)
  return Instruction(found.group(1), shape, opcode, operands, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
  """Returns the place of the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  return len(text)


def executed(
  program: HloProgram,
  unknown: Trips = ONCE,  # noqa: B008
) -> Iterator[tuple[Instruction, Computation, int]]:
  """Yields all instructions that a run of the program executes, with how often it does.

  Instructions inside fusions and called computations are among them. Of a conditional's branches,
  each counts.

  Args:
    program: from `parse`.
    unknown: how often loops run whose count depends on data.
  """
  yield from _run(program, program.computations[program.entry], 1, {}, unknown)


def _run(program, computation, times, constants, unknown):
  """`constants`: elements of the parameter tuple that are known numbers."""
  for instruction in computation.instructions.values():
    yield instruction, computation, times
    if instruction.opcode == "while":
      body = program.computations[_attribute(instruction, "body")]
      trips, invariant = loop(program, instruction, computation, constants, unknown)
      yield from _run(program, body, round(times * trips), invariant, unknown)
    # The start of an asynchronous operation names what it calls, and so do its later parts.
    elif not instruction.opcode.endswith(("-update", "-done")):
      for name in called(instruction):
        yield from _run(program, program.computations[name], times, {}, unknown)


def called(instruction: Instruction) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  return [
    name
    for group in _CALLED.findall(instruction.rest)
    for name in re.findall(r"%([\w.\-]+)", group)
  ]


def _attribute(instruction: Instruction, key: str) -> str:
  return re.search(rf"\b{key}=%([\w.\-]+)", instruction.rest).group(1)


def loop(program, instruction: Instruction, where: Computation, constants, unknown: Trips):
  """Returns how often a while loop runs, and its known elements that it does not change.

  Args:
    program: the program.
    instruction: the loop.
    where: the computation that it is in.
    constants: elements of that computation's parameter that are known, by index.
    unknown: what to say of counts that depend on data.
  """
  body = program.computations[_attribute(instruction, "body")]
  condition = program.computations[_attribute(instruction, "condition")]
  starts = _elements(program, where, instruction.operands[0], constants)
  steps = _elements(program, body, body.root.name, None)
  invariant = {
    index: start
    for index, start in starts.items()
    if isinstance(start, int) and steps.get(index) == (index, 0)
  }
  # The step of a counter may itself be handed through the loop.
  steps = _elements(program, body, body.root.name, invariant)
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if known:
    return int(known.group(1)), invariant
  compared = _comparison(program, condition, invariant)
  if compared is None:
    return unknown.to_unknown, invariant
  (index, offset), direction, limit = compared
  start, step = starts.get(index), steps.get(index)
  if not isinstance(step, tuple) or step[0] != index or not step[1]:
    return unknown.to_unknown, invariant
  if not isinstance(start, int):
    return unknown.from_unknown, invariant
  if not isinstance(limit, int):
    by_counter = isinstance(limit, tuple) and _by_counter(program, where, instruction, limit[0])
    return unknown.to_counter if by_counter else unknown.to_unknown, invariant
  distance = limit - (start + offset) + {"LE": 1, "GE": -1}.get(direction, 0)
  return max(0, -(-distance // step[1])), invariant


def _by_counter(program, where: Computation, loop: Instruction, index: int) -> bool:
  """Returns whether a loop's limit, an element of its tuple, is the counter of the outer loop."""
  made = where.instructions[loop.operands[0]]
  if made.opcode != "tuple":
    return False
  name = made.operands[index]
  return isinstance(_value(program, where, name, None), tuple) or _listed(program, where, name)


def _listed(program, computation: Computation, name: str, bound=None) -> bool:
  """Returns whether a number is looked up by a counter in a list; `bound` as of `_value`."""
  made = computation.instructions.get(name)
  while made is not None and made.opcode in _COPIES:
    made = computation.instructions.get(made.operands[0])
  if made is None:
    return False
  if made.opcode == "fusion":
    values = [_value(program, computation, operand, None, bound) for operand in made.operands]
    called = program.computations[_attribute(made, "calls")]
    return _listed(program, called, called.root.name, values)
  places = made.operands[1:] if made.opcode == "dynamic-slice" else ()
  return any(isinstance(_value(program, computation, at, None, bound), tuple) for at in places)


def _comparison(program, condition: Computation, constants):
  """Returns ((element, offset), direction, limit or None) of a condition on a counter."""
  root, bound = condition.root, None
  if root.opcode == "fusion":
    bound = [_value(program, condition, name, constants) for name in root.operands]
    condition = program.computations[_attribute(root, "calls")]
    root = condition.root
  if root.opcode != "compare":
    return None
  first, second = (_value(program, condition, name, constants, bound) for name in root.operands)
  direction = re.search(r"direction=(\w\w)", root.rest).group(1)
  if not isinstance(first, tuple):
    first, second = second, first
    direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
  if not isinstance(first, tuple) or direction == "EQ":
    return None
  return first, direction, second


def _elements(program, computation: Computation, name: str, constants) -> dict:
  """Returns index -> value of a tuple's elements, where known."""
  made = computation.instructions[name]
  while made.opcode in _COPIES:
    made = computation.instructions[made.operands[0]]
  if made.opcode != "tuple":
    return {}
  values = (_value(program, computation, operand, constants) for operand in made.operands)
  return {index: value for index, value in enumerate(values) if value is not None}


def _value(program, computation: Computation, name: str, constants, bound=None):
  """Returns an int, (element of the parameter tuple, offset from it), or None: not known.

  Args:
    program: the program.
    computation: where the name is.
    name: of an instruction.
    constants: elements of the parameter tuple that are known, by index.
    bound: values of a fusion's parameters.
  """
  made = computation.instructions.get(name)
  if made is None:
    return None
  if made.opcode in _COPIES:
    return _value(program, computation, made.operands[0], constants, bound)
  if made.opcode == "constant":
    return int(made.operands[0]) if re.fullmatch(r"-?\d+", made.operands[0]) else None
  if made.opcode == "parameter" and bound is not None:
    return bound[int(made.operands[0])]
  if made.opcode == "get-tuple-element":
    source = computation.instructions[made.operands[0]]
    index = int(re.search(r"index=(\d+)", made.rest).group(1))
    if source.opcode == "parameter":
      return (constants or {}).get(index, (index, 0))
    if source.opcode == "tuple":
      return _value(program, computation, source.operands[index], constants, bound)
    return None
  if made.opcode == "fusion" and "calls=" in made.rest:
    values = [_value(program, computation, operand, constants, bound) for operand in made.operands]
    called = program.computations[_attribute(made, "calls")]
    return _value(program, called, called.root.name, None, values)
  if made.opcode in ("add", "subtract"):
    first, second = (
      _value(program, computation, operand, constants, bound) for operand in made.operands
    )
    return _sum(first, second, -1 if made.opcode == "subtract" else 1)
  return None


def _sum(first, second, sign: int):
  if isinstance(second, tuple) and sign == 1:
    first, second = second, first
  if not isinstance(second, int) or first is None:
    return None
  return (first[0], first[1] + sign * second) if isinstance(first, tuple) else first + sign * second
