"""The operations (FLOPs) of a compiled program."""

import math
import re

import numpy as np

from vlalign_jax.hlo.loops import ONCE, Trips, executed
from vlalign_jax.hlo.parser import Computation, HloProgram, Instruction, arrays

# The dimensions that a dot, or a cuBLAS call, sums over.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=|ensions":)[{[]([\d,"]*)[}\]]')
_CUBLAS = re.compile(r'custom_call_target="__cublas\$')
# Attention kernels: splash on TPUs, cuDNN's on GPUs.
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call"|__cudnn\$fmha)')
# Products that an attention kernel computes. Backward: the scores again, then gradients of the
# attention weights, of values, queries and keys; a TPU's kernel splits them over two passes, which
# both compute the first two.
_FORWARD, _BACKWARD, _DKV, _DQ = 2, 5, 4, 3


def flops(program: HloProgram, unknown: Trips = ONCE) -> float:
  """Counts operations that one device runs: 2 for a multiplication with its sum.

  Counts matrix products, convolutions, and attention kernels, whose causal mask leaves half of the
  pairs; not sums, norms and the like.

  Args:
    program: from `parser.parse`.
    unknown: how often loops run whose count depends on data.
  """
  return sum(
    times * _flops(instruction, computation)
    for instruction, computation, times in executed(program, unknown)
  )


def kernels(program: HloProgram, unknown: Trips = ONCE) -> int:
  """Counts calls of attention kernels on one device."""
  return sum(times for call, _, times in executed(program, unknown) if _is_kernel(call))


def _is_kernel(instruction: Instruction) -> bool:
  return instruction.opcode == "custom-call" and bool(_KERNEL.search(instruction.rest))


def _flops(instruction: Instruction, computation: Computation) -> float:
  opcode, rest = instruction.opcode, instruction.rest
  is_kernel = _is_kernel(instruction)
  is_dot = opcode == "dot" or (opcode == "custom-call" and _CUBLAS.search(rest))
  if not (is_dot or is_kernel or opcode == "convolution"):
    return 0.0
  operands = [
    arrays(computation.instructions[name].shape)[0][1]
    for name in instruction.operands
    if name in computation.instructions
  ]
  if is_kernel:
    return _attention(instruction, operands)
  output = arrays(instruction.shape)[0][1]
  if opcode == "convolution":
    left, kernel = operands
    return _convolution(rest, left, kernel, output)
  contracted = _CONTRACTED.search(rest)
  axes = map(int, re.findall(r"\d+", contracted[1])) if contracted else ()
  return 2.0 * math.prod(output) * math.prod(operands[0][axis] for axis in axes)


def _attention(kernel: Instruction, operands: list[tuple[int, ...]]) -> float:
  """Counts an attention kernel's operations from the shapes of queries and keys.

  Splash has queries [..., H, T, D] and keys [..., K, S, D] and is always causal here; cuDNN names
  [B, H, T, S] and the mask in its configuration.
  """
  rest = kernel.rest
  if scores := re.search(r'intermediate_tensor_shape.*?"dimensions": ?\[([^\]]*)\]', rest):
    pairs = math.prod(map(int, re.findall(r"\d+", scores[1])))
    products = _BACKWARD if "Backward" in rest else _FORWARD
    return 2.0 * products * pairs * operands[0][-1] / (1 + ("CAUSAL" in rest))
  queries, keys = [sizes for sizes in operands if len(sizes) >= 3 and math.prod(sizes) > 1][:2]
  products = _DKV if "dkv" in kernel.name else _DQ if "dq" in kernel.name else _FORWARD
  return products * math.prod(queries) * keys[-2]


def _convolution(rest: str, left: tuple, kernel: tuple, output: tuple) -> float:
  """Counts a convolution's operations; a TPU writes batched products as dilated convolutions."""
  inputs, kernels, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
  total = 2.0 * output[outputs.index("b")] * output[outputs.index("f")]
  total *= kernel[kernels.index("i")]
  window = re.search(r"window=\{([^}]*)\}", rest)
  window = re.findall(r"(\w+)=([\dx_\-]+)", window[1]) if window else ()
  for axis in range(len(left) - 2):
    label = str(axis)
    total *= _hits(
      left[inputs.index(label)],
      kernel[kernels.index(label)],
      output[outputs.index(label)],
      {key: sizes.split("x")[axis] for key, sizes in window},
    )
  return total


def _hits(length: int, kernel: int, output: int, window: dict[str, str]) -> int:
  """Counts pairs (output, kernel) of one dimension that meet an element, not padding."""
  low = int(window.get("pad", "0_0").split("_")[0])
  stride, left, right = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
  place = np.arange(output)[:, None] * stride - low + np.arange(kernel)[None, :] * right
  return int(np.count_nonzero((place >= 0) & (place % left == 0) & (place // left < length)))
