"""Counts of compiled programs: the CPU compiler's, and lines as other compilers write them."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.hlo.compiled_loops import DEVICES, OUTER, SIZE, STEPS
from vlalign_jax.hlo import collectives, memory, operations
from vlalign_jax.hlo.parser import parse

RING = (DEVICES - 1) / DEVICES
VECTOR, MATRIX = 4 * SIZE, 4 * SIZE * SIZE


@pytest.fixture(scope="module")
def compiled():
  process = subprocess.run(
    [sys.executable, "-m", "tests.hlo.compiled_loops"],
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


EXPECTED = {
  "psum_in_scan": {
    "flops": OUTER * STEPS * 2 * SIZE * SIZE,
    "all-reduce": [OUTER * STEPS, OUTER * STEPS * 2 * RING * VECTOR],
  },
  "ring": {"flops": 0, "collective-permute": [STEPS, STEPS * VECTOR]},
  "gather_layers": {
    "flops": STEPS * 2 * SIZE * SIZE,
    "all-gather": [STEPS, STEPS * RING * MATRIX],
  },
  "up_to_counter": {"flops": 2 * STEPS * (STEPS + 1) // 2 * 2 * SIZE * SIZE},
  "until_data_says": {"flops": 0, "all-reduce": [7, 7 * 2 * RING * VECTOR]},
  "scatter": {
    "flops": 0,
    "reduce-scatter": [1, RING * DEVICES * VECTOR],
    "all-to-all": [1, RING * VECTOR],
  },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_collectives_and_products_of_compiled_programs(compiled, name):
  assert compiled[name] == EXPECTED[name]


# A product that gathers its operand in a ring, two pieces per turn of the loop, while another
# collective goes on; layouts, comments and attributes as on a TPU.
TPU = """HloModule jit_step, is_scheduled=true

%body.1 (p: (bf16[8,64], bf16[16,64], u32[], /*index=3*/u32[])) -> (bf16[8,64], bf16[16,64], u32[], u32[]) {
  %p = (bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) parameter(0)
  %piece = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=0
  %whole = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %turn = u32[]{:T(128)} get-tuple-element(%p), index=2
  %two = u32[]{:T(128)} get-tuple-element(%p), index=3
  %permute-start = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%piece), channel_id=1, source_target_pairs={{0,3},{1,0},{2,1},{3,2}}
  %permute-done = bf16[8,64]{1,0} collective-permute-done(%permute-start), metadata={op_name="a"}
  %permute-start.1 = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%permute-done), channel_id=2, source_target_pairs={{0,3},{1,0},{2,1},{3,2}}
  %permute-done.1 = bf16[8,64]{1,0} collective-permute-done(%permute-start.1)
  %product = bf16[16,64]{1,0} fusion(%permute-done.1, %whole), kind=kOutput, calls=%middle
  %next = u32[]{:T(128)} add(%turn, %two)
  ROOT %t = (bf16[8,64]{1,0}, bf16[16,64]{1,0}, u32[], /*index=3*/u32[]) tuple(%permute-done.1, %product, %next, /*index=3*/%two)
}

%condition.1 (p.1: (bf16[8,64], bf16[16,64], u32[], /*index=3*/u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p.1 = (bf16[8,64]{1,0}, bf16[16,64]{1,0}, u32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) parameter(0)
  %turn.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %limit), direction=LT, backend_config={"a":{"b":[]}}
}

%start (q: f32[4,128]) -> (f32[4,128], f32[16,128]) {
  %q = f32[4,128]{1,0} parameter(0)
  %gather = f32[16,128]{1,0} all-gather(%q), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %started = (f32[4,128]{1,0}, f32[16,128]{1,0}) custom-call(%q, %gather), custom_call_target="start"
}

%middle (a: bf16[8,64], b: bf16[16,64]) -> bf16[16,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[16,64]{1,0} parameter(1)
  %some = f32[4,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %gather.1 = f32[16,128]{1,0} all-gather(%some), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %c = bf16[16,8]{1,0} convolution(%b, %a), dim_labels=bf_oi->bf
}

%all-reduce-scatter.2 (x: f32[32,8]) -> f32[8,8] {
  %x = f32[32,8]{1,0} parameter(0)
  %sum = f32[32,8]{1,0} all-reduce(%x), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,8}
}

ENTRY %main (w: bf16[8,64], v: f32[4,128], g: f32[32,8]) -> bf16[16,64] {
  %w = bf16[8,64]{1,0} parameter(0)
  %v = f32[4,128]{1,0} parameter(1)
  %g = f32[32,8]{1,0} parameter(2)
  %queries = bf16[2,8,256,24]{3,2,1,0} constant({...})
  %keys = bf16[2,4,256,24]{3,2,1,0} constant({...})
  %begun = (f32[4,128]{1,0}, f32[16,128]{1,0}) fusion(%v), kind=kCustom, calls=%start
  %kernel = bf16[16,64]{1,0} custom-call(%queries, %keys, %keys), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{}"
}}, metadata={op_name="splash"}
  %scattered = f32[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %nought = u32[]{:T(128)} constant(0)
  %nought.1 = u32[]{:T(128)} copy(%nought)
  %step = u32[]{:T(128)} constant(2)
  %init = (bf16[8,64]{1,0}, bf16[16,64]{1,0}, u32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) tuple(%w, %kernel, %nought.1, /*index=3*/%step)
  %loop = (bf16[8,64]{1,0}, bf16[16,64]{1,0}, u32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) while(%init), condition=%condition.1, body=%body.1
  ROOT %result = bf16[16,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
  program = parse(TPU)
  traffic = collectives.traffic(program, devices=8)
  turns = 4  # from 0 to below 8 by 2, the step handed through the loop
  assert {kind: (total.count, total.bytes) for kind, total in traffic.items()} == {
    "collective-permute": (turns * 2, turns * 2 * 2 * 8 * 64),
    "all-gather": (1, 3 / 4 * 4 * 16 * 128),  # once, though the loop works on it four times
    "reduce-scatter": (1, 3 / 4 * 4 * 32 * 8),
  }
  attention = 2 * 2 * 2 * 8 * 256 * 256 * 24 / 2  # two products, half of the pairs
  assert operations.flops(program) == turns * 2 * 16 * 8 * 64 + attention
  assert operations.kernels(program) == 1


# Lines of a program for H100s with `--xla_gpu_enable_triton_gemm=false`.
GPU = """ENTRY %main (q: bf16[4,256,8,128], k: bf16[4,256,4,128], x: bf16[1024,1024], w: bf16[1024,512]) -> bf16[1024,512] {
  %q = bf16[4,256,8,128]{3,2,1,0} parameter(0)
  %k = bf16[4,256,4,128]{3,2,1,0} parameter(1)
  %x = bf16[1024,1024]{1,0} parameter(2)
  %w = bf16[1024,512]{1,0} parameter(3)
  %forward = (bf16[4,8,256,128]{3,1,2,0}, f32[4,8,256]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "8", "256", "256"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}
  %backward = (bf16[4,8,256,128]{3,1,2,0}, bf16[4,4,256,128]{3,1,2,0}, bf16[4,4,256,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "8", "256", "256"], "tuple_shapes": []}, "mask_type": "NO_MASK"}}
  %product = (bf16[1024,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %result = bf16[1024,512]{1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501


def test_kernels_of_a_gpu_program():
  program = parse(GPU)
  scores = 2 * 4 * 8 * 256 * 256 * 128
  attention = 2 * scores / 2 + 5 * scores  # half of the first's pairs are hidden
  assert operations.flops(program) == attention + 2 * 1024 * 1024 * 512
  assert operations.kernels(program) == 2


def _convolution(line: str, left: str, kernel: str) -> float:
  return operations.flops(
    parse(
      f"ENTRY %main (l: {left}, k: {kernel}) -> f32[] {{\n"
      f"  %l = {left} parameter(0)\n  %k = {kernel} parameter(1)\n  ROOT %c = {line}\n}}\n"
    )
  )


def test_batched_products_are_dilated_convolutions():
  """Counts 16 products [512, 128] x [128, 512], as the TPU's compiler writes the batch."""
  line = (
    "f32[512,512,16]{1,0,2} convolution(%l, %k), "
    "window={size=16 stride=15 lhs_dilate=16}, dim_labels=bf0_oi0->bf0"
  )
  flops = _convolution(line, "bf16[512,128,16]", "bf16[512,128,16]")
  assert flops == 2 * 16 * 512 * 512 * 128


def test_padding_counts_nothing():
  line = "f32[1,8,5]{2,1,0} convolution(%l, %k), window={size=3 pad=1_1}, dim_labels=bf0_oi0->bf0"
  assert _convolution(line, "f32[1,4,5]", "f32[8,4,3]") == 2 * 8 * 4 * (3 * 5 - 2)


def test_text_that_is_not_a_program():
  with pytest.raises(ValueError, match="no entry computation"):
    parse("module @jit_step {\n}\n")


def test_bytes_of_slices_and_updates_in_place():
  """Reads a layer of one stack and writes a layer of another; both stay in memory."""
  program = parse("""
%slice_and_put (stack: f32[32,64], kept: f32[32,64], at: s32[]) -> f32[32,64] {
  %stack = f32[32,64]{1,0} parameter(0)
  %kept = f32[32,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,64]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,64}
  ROOT %put = f32[32,64]{1,0} dynamic-update-slice(%kept, %layer, %at, %zero)
}

ENTRY %main (a: f32[32,64], b: f32[32,64], n: s32[]) -> f32[32,64] {
  %a = f32[32,64]{1,0} parameter(0)
  %b = f32[32,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %put.1 = f32[32,64]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%slice_and_put
  %near = f32[32,64]{1,0:T(8,128)S(1)} negate(%put.1)
  ROOT %sum = f32[32,64]{1,0} add(%put.1, %near)
}
""")
  stack, layer, index = 32 * 64 * 4, 64 * 4, 4
  fusion = layer + layer + index
  assert memory.bytes_accessed(program) == fusion + stack + 2 * stack


def test_bytes_are_those_of_the_compilers_own_count():
  """Agrees without a loop; in a scan each step counts, which the compiler leaves out."""
  once = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
  loop = lambda x, w: jax.lax.scan(lambda x, _: (once(x, w), None), x, None, length=7)[0]  # noqa: E731
  x, w = jnp.zeros((64, 128)), jnp.zeros((128, 128))
  counts = []
  for function in (once, loop):
    compiled = jax.jit(function).lower(x, w).compile()
    ours = memory.bytes_accessed(parse(compiled.as_text()))
    counts.append((ours, compiled.cost_analysis()["bytes accessed"]))
  assert counts[0][0] == pytest.approx(counts[0][1], rel=0.05)
  assert counts[1][0] == pytest.approx(7 * counts[0][0], rel=0.4)  # copies of a loop's own
  assert counts[1][0] > 4 * counts[1][1]
