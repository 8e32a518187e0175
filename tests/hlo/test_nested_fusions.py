"""A TPU's fusion of a product may have a fusion inside that slices its operand."""

from vlalign_jax.hlo import memory
from vlalign_jax.hlo.parser import parse

PROGRAM = """
%one_layer (stack: bf16[32,64,48], index: s32[]) -> bf16[64,48] {
  %stack = bf16[32,64,48]{2,1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = bf16[1,64,48]{2,1,0} dynamic-slice(%stack, %index, %zero, %zero)
  ROOT %kernel = bf16[64,48]{1,0} bitcast(%layer)
}

%product (x: bf16[16,64], stack: bf16[32,64,48], index: s32[]) -> bf16[16,48] {
  %x = bf16[16,64]{1,0} parameter(0)
  %stack = bf16[32,64,48]{2,1,0} parameter(1)
  %index = s32[] parameter(2)
  %kernel = bf16[64,48]{1,0} fusion(%stack, %index), kind=kLoop, calls=%one_layer
  ROOT %y = bf16[16,48]{1,0} convolution(%x, %kernel), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[16,64], stack: bf16[32,64,48], index: s32[]) -> bf16[16,48] {
  %x = bf16[16,64]{1,0} parameter(0)
  %stack = bf16[32,64,48]{2,1,0} parameter(1)
  %index = s32[] parameter(2)
  ROOT %y = bf16[16,48]{1,0} fusion(%x, %stack, %index), kind=kOutput, calls=%product
}
"""


def test_a_product_reads_one_layer_of_a_stack():
  read = 16 * 64 + 64 * 48
  assert memory.bytes_accessed(parse(PROGRAM)) == 2 * (read + 16 * 48) + 4
