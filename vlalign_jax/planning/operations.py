"""The operations of a compiled program, and the bytes that it moves between memory and cores."""

import math
import re
from collections.abc import Iterator

import numpy as np

from vlalign_jax.planning import hlo

# A dot's, or a cuBLAS call's dimensions that are summed over.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=|ensions":)[{[]([\d,"]*)[}\]]')
_CUBLAS = re.compile(r'custom_call_target="__cublas\$')
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha')
_TPU_KERNEL = 'custom_call_target="tpu_custom_call"'
# Products that an attention kernel computes. Backward: the scores again, then gradients of the
# attention weights, of values, queries and keys; a TPU's kernel splits them over two passes, which
# both compute the first two.
_FORWARD, _BACKWARD, _DKV, _DQ = 2, 5, 4, 3
# Instructions that move nothing themselves.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("call", "after-all", "opt-barrier", "iota", "partition-id", "replica-id", "async-start"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


def flops(program: hlo.HloProgram, unknown: hlo.Trips = hlo.ONCE) -> float:
  """Counts operations that one device runs: 2 for a multiplication with its sum.

  Counts matrix products, convolutions and attention kernels (splash on TPUs, cuDNN on GPUs), of
  which half of the pairs of a causal mask; sums, norms and the like are not counted.

  Args:
    program: from `hlo.parse`.
    unknown: how often loops run whose count depends on data.
  """
  return sum(
    times * _flops(instruction, computation)
    for instruction, computation, times in hlo.executed(program, unknown)
  )


def _flops(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  if instruction.opcode == "dot":
    return _dot(instruction, where)
  if instruction.opcode == "convolution":
    return _convolution(instruction, where)
  if instruction.opcode != "custom-call":
    return 0.0
  if _CUBLAS.search(instruction.rest):
    return _dot(instruction, where)
  if _is_kernel(instruction):
    return _attention(instruction, where)
  return 0.0


def _is_kernel(instruction: hlo.Instruction) -> bool:
  return instruction.opcode == "custom-call" and (
    _TPU_KERNEL in instruction.rest or _CUDNN.search(instruction.rest) is not None
  )


def kernels(program: hlo.HloProgram, unknown: hlo.Trips = hlo.ONCE) -> int:
  """Counts calls of attention kernels on one device."""
  return sum(times for found, _, times in hlo.executed(program, unknown) if _is_kernel(found))


def _attention(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  """Counts an attention kernel's operations from the shapes of queries and keys.

  Splash has queries [..., H, T, D] and keys [..., K, S, D] and is always causal here; cuDNN says
  [B, H, T, S] and the mask in its configuration.
  """
  arrays = [_sizes(name, where) for name in instruction.operands if name in where.instructions]
  scores = re.search(r'intermediate_tensor_shape.*?"dimensions": ?\[([^\]]*)\]', instruction.rest)
  if scores:
    pairs = math.prod(map(int, re.findall(r"\d+", scores.group(1))))
    causal = "CAUSAL" in instruction.rest
    products = _BACKWARD if "Backward" in instruction.rest else _FORWARD
    head_dim = arrays[0][-1]
  else:
    queries, keys = [sizes for sizes in arrays if len(sizes) >= 3 and math.prod(sizes) > 1][:2]
    pairs, causal, head_dim = math.prod(queries[:-1]) * keys[-2], True, queries[-1]
    name = instruction.name
    products = _DKV if "dkv" in name else _DQ if "dq" in name else _FORWARD
  return 2.0 * products * pairs * head_dim / (1 + causal)


def bytes_accessed(program: hlo.HloProgram, unknown: hlo.Trips = hlo.ONCE) -> float:
  """Counts bytes that one device reads from its memory and writes to it.

  An instruction reads its operands and writes its result; a fusion is one instruction; what is
  sliced, or updated in place, counts as large as the slice; what a TPU keeps in a core's own
  memory counts nothing. So does XLA's own count, in which a loop's body counts once.

  Args:
    program: from `hlo.parse`.
    unknown: how often loops run whose count depends on data.
  """
  inside = {
    name
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode == "fusion"
    for name in hlo.called(instruction)
  }
  return sum(
    times * _moved(program, instruction, computation)
    for instruction, computation, times in hlo.executed(program, unknown)
    if computation.name not in inside
  )


def _moved(program: hlo.HloProgram, instruction: hlo.Instruction, where: hlo.Computation) -> float:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-done", "-update")):
    return 0.0
  if opcode in ("copy-start", "slice-start"):  # its result names both places
    return _bytes(instruction.shape)
  if opcode in _SLICES:
    return 2 * _bytes(instruction.shape)
  if opcode in _UPDATES:
    update = instruction.operands[1 if opcode == "dynamic-update-slice" else -1]
    return 2 * _bytes(where.instructions[update].shape)
  operands = [where.instructions.get(name) for name in instruction.operands]
  sizes = [_bytes(operand.shape) if operand else 0.0 for operand in operands]
  if opcode == "fusion":
    return _moved_by_fusion(program.computations[hlo.called(instruction)[0]], sizes)
  return sum(sizes) + _bytes(instruction.shape)


def _moved_by_fusion(fused: hlo.Computation, operands: list[float]) -> float:
  users: dict[str, list[hlo.Instruction]] = {}
  for instruction in fused.instructions.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  total = 0.0
  for instruction in fused.instructions.values():
    if instruction.opcode == "parameter":
      reads = list(_readers(instruction, users))
      size = operands[int(instruction.operands[0])]
      if reads and all(part is not None for part in reads):
        size = min(size, sum(reads))
      total += size
  return total + sum(_written(fused, name) for name in _results(fused))


def _readers(made: hlo.Instruction, users) -> Iterator[float | None]:
  """Yields the bytes that each user reads of an array; None: all of it."""
  for user in users.get(made.name, ()):
    if user.opcode == "bitcast":
      yield from _readers(user, users)
    elif user.opcode in _SLICES and user.operands[0] == made.name:
      yield _bytes(user.shape)
    elif user.opcode in _UPDATES and user.operands[0] == made.name:
      yield 0.0  # it stays where it is
    else:
      yield None


def _results(fused: hlo.Computation) -> tuple[str, ...]:
  return fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)


def _written(fused: hlo.Computation, name: str) -> float:
  made = fused.instructions[name]
  while made.opcode == "bitcast":
    made = fused.instructions[made.operands[0]]
  if made.opcode == "dynamic-update-slice":
    return _bytes(fused.instructions[made.operands[1]].shape)
  return _bytes(made.shape)


def _bytes(shape: str) -> float:
  """Returns the bytes of a type's arrays that are in the device's memory, not in a core's, S(1)."""
  return hlo.bytes_of(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}", "", shape))


def _sizes(name: str, where: hlo.Computation) -> tuple[int, ...]:
  return hlo.arrays(where.instructions[name].shape)[0][1]


def _dot(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  left = _sizes(instruction.operands[0], where)
  contracted = _CONTRACTED.search(instruction.rest)
  axes = map(int, re.findall(r"\d+", contracted.group(1))) if contracted else ()
  output = hlo.arrays(instruction.shape)[0][1]
  return 2.0 * math.prod(output) * math.prod(left[axis] for axis in axes)


def _convolution(instruction: hlo.Instruction, where: hlo.Computation) -> float:
  """Counts products of a TPU program: convolutions, batches of them with dilated windows."""
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
  window = re.search(r"window=\{([^}]*)\}", instruction.rest)
  return window.group(1) if window else ""


def _hits(length: int, kernel: int, output: int, window: dict[str, str]) -> int:
  """Counts pairs (output, kernel) of one dimension that meet an element, not padding."""
  low = int(window.get("pad", "0_0").split("_")[0])
  stride, left, right = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
  place = np.arange(output)[:, None] * stride - low + np.arange(kernel)[None, :] * right
  return int(np.count_nonzero((place >= 0) & (place % left == 0) & (place // left < length)))
