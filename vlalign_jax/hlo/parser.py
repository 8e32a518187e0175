"""The text of a compiled program (HLO), read into computations and instructions."""

import dataclasses
import math
import re
from typing import Any

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.+?) ([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|body|condition|true_computation|false_computation|branch_computations|"
  r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; `shape` is the text of its type, `rest` the attributes' text.

  `operands` are names of instructions, or the text of a constant or of a parameter's number.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  def attribute(self, key: str) -> str:
    """Returns the name of the computation in an attribute such as `body`."""
    return re.search(rf"\b{key}=%([\w.\-]+)", self.rest)[1]

  def called(self) -> list[str]:
    """Returns the names of the computations that the instruction runs."""
    return _NAME.findall(" ".join(_CALLED.findall(self.rest)))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name; the root is the one whose value is returned."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction


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
    math.prod(sizes) * int((re.findall(r"\d+", dtype) or [8])[0]) / 8  # pred has no number
    for dtype, sizes in arrays(shape)
  )


def parse(text: str) -> HloProgram:
  """Parses the text that `compiled.as_text()` returns.

  Raises:
    ValueError: it is not the text of a program.
  """
  computations, instructions, entry, name = {}, {}, None, None
  root: Any = None
  for line in text.splitlines():
    if name is None:
      if header := _HEADER.match(line):
        name, instructions, root = header[2], {}, None
        entry = name if header[1] else entry
    elif line.rstrip() == "}":
      computations[name] = Computation(name, instructions, root)
      name = None
    elif start := _INSTRUCTION.match(line):
      is_root, key, shape, opcode = start.groups()
      operands, rest = _split_operands(line[start.end() :])
      instructions[key] = Instruction(key, shape, opcode, operands, rest)
      root = instructions[key] if is_root else root
  if entry is None:
    raise ValueError("no entry computation: not the text of a compiled program")
  return HloProgram(computations, entry)


def _split_operands(text: str) -> tuple[tuple[str, ...], str]:
  """Splits what follows an opening parenthesis into (operands, text after the closing one)."""
  depth, end = 1, len(text)
  for parenthesis in re.finditer(r"[()]", text):
    depth += 1 if parenthesis[0] == "(" else -1
    if depth == 0:
      end = parenthesis.start()
      break
  return tuple(_NAME.findall(text[:end])) or (text[:end],), text[end + 1 :]
