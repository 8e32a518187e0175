"""Attention by backend: time, rate, memory and error against float32.

FLOPs are 4 B H T^2 D of a forward pass, halved where attention is causal, and 3.5 times that with
the backward pass, whatever a mask hides: less work for the same rows shows as a higher rate.
"""

import functools

import jax
import jax.numpy as jnp

from accelerator_lines import timing
from vlalign_jax.models import attention, backends, tiles


def rows_of(kind: str, rows: int, length: int):
  """Returns (segments, branches or None) of rows, int32[B, T]."""
  index = jnp.broadcast_to(jnp.arange(length), (rows, length))
  if kind == "single":
    return jnp.ones((rows, length), jnp.int32), None
  if kind == "packed":
    return index // -(-length // 4) + 1, None
  half, quarter = length // 2, length // 4
  return jnp.ones((rows, length), jnp.int32), jnp.where(
    index < half, 0, 1 + (index - half) // quarter
  )


def reference(query, key, value, mask):
  """Plain softmax attention of one row in float32; `mask` bool[1, T, S] or None."""
  query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("BTHD,BSHD->BHTS", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
      scores = jnp.where(mask[:, None], scores, -1e30)
    return jnp.einsum("BHTS,BSHD->BTHD", jax.nn.softmax(scores, axis=-1), value)


def candidates(kind: str, same_heads: bool) -> dict:
  """Returns name -> `(query, key, value, layout, mask) -> attended` for causal rows.

  The layout and the mask bool[B, T, T] are arguments: as constants, the compiler would compute
  beforehand what a step has to do each time.
  """

  def library(implementation, **options):
    product = functools.partial(
      jax.nn.dot_product_attention, implementation=implementation, **options
    )
    return lambda q, k, v, layout, mask: product(q, k, v, mask=mask[:, None])

  def unmasked(q, k, v, layout, mask):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", is_causal=True)

  def lengths(q, k, v, layout, mask):
    sizes = jnp.sum(layout.segments > 0, axis=1)
    options = {"query_seq_lengths": sizes, "key_value_seq_lengths": sizes}
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", is_causal=True, **options)

  def bias(q, k, v, layout, mask):
    added = jnp.where(mask, 0, -1e30).astype(q.dtype)[:, None]
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", bias=added)

  ways = {f"ours {name}": ours(name) for name in (backends.AUTO, backends.TILES)}
  if kind == "single" and same_heads:
    ways |= {"cudnn causal, no mask": unmasked, "cudnn causal, lengths": lengths}
  ways["cudnn causal, mask"] = library("cudnn", is_causal=True)
  if kind == "packed":
    ways["cudnn packed layout"] = packed_layout
  if same_heads:
    ways |= {"cudnn bias": bias, "xla mask": library("xla")}
    if kind != "branches":
      ways["pallas mha"] = pallas
  return ways


def ours(backend: str):
  """Returns the library's attention by one backend."""

  def attend(q, k, v, layout, mask):
    del mask
    return attention.attend(q, k, v, layout.segments, layout.branches, backend=backend)

  return attend


def packed_layout(query, key, value, layout, mask, parts: int = 4):
  """cuDNN's packed layout, with rows of so many segments of one length."""
  del layout, mask
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  rows, length, _, width = query.shape
  size = length // parts
  sizes = jnp.full((rows, parts), size, jnp.int32)
  offsets = jnp.broadcast_to(jnp.arange(parts + 1, dtype=jnp.int32) * size, (rows, parts + 1))
  return cudnn.dot_product_attention(
    query,
    key,
    value,
    q_seqlen=sizes,
    kv_seqlen=sizes,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=width**-0.5,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
  )


def pallas(query, key, value, layout, mask):
  """JAX's Pallas-Triton kernel."""
  del mask
  from jax.experimental.pallas.ops.gpu import attention as kernels

  return kernels.mha(
    query, key, value, layout.segments, sm_scale=query.shape[-1] ** -0.5, causal=True
  )


def relative_error(given, expected) -> float:
  """Returns the largest difference by the largest expected size."""
  gap = jnp.max(jnp.abs(given.astype(jnp.float32) - expected))
  return float(gap / jnp.max(jnp.abs(expected)))


def measure(function, arrays, others, cotangent, expected, flops: float, inner: int) -> dict:
  """Returns times, rates and errors of one way.

  Args:
    function: `(query, key, value, *others) -> attended`.
    arrays: query, key and value.
    others: further arguments.
    cotangent: of what it returns.
    expected: (attended, gradients) of the first row, float32.
    flops: of a forward pass.
    inner: calls for one measurement.
  """

  def backward(cotangent, arrays, others):
    attended, pull = jax.vjp(lambda *arrays: function(*arrays, *others), *arrays)
    return attended, pull(cotangent)

  ahead, _ = timing.compiled(jax.jit(function), *arrays, *others)
  both, _ = timing.compiled(jax.jit(backward), cotangent, arrays, others)
  forward_took = timing.seconds(lambda: ahead(*arrays, *others), inner=inner, repeats=3)
  took = timing.seconds(lambda: both(cotangent, arrays, others), inner=inner, repeats=3)
  attended, gradients = jax.tree.map(lambda x: x[:1], both(cotangent, arrays, others))
  return {
    "forward_ms": forward_took * 1e3,
    "forward_tflops": flops / forward_took / 1e12,
    "both_ms": took * 1e3,
    **timing.of_peak(3.5 * flops, took),
    "temp_GiB": timing.temporaries(both),
    "error": relative_error(attended, expected[0]),
    "gradient_error": max(map(relative_error, gradients, expected[1])),
  }


def expect(arrays, cotangent, mask):
  """Returns (attended, gradients) of the first row in float32."""
  first = [x[:1].astype(jnp.float32) for x in (*arrays, cotangent)]
  mask = None if mask is None else mask[:1]

  @jax.jit
  def both(query, key, value, cotangent):
    attended, pull = jax.vjp(functools.partial(reference, mask=mask), query, key, value)
    return attended, pull(cotangent)

  return both(*first)


def draw(rows, queries, heads, kv_heads, width):
  """Returns ((query, key, value), cotangent), bfloat16."""
  shapes = [(rows, queries, count, width) for count in (heads, kv_heads, kv_heads, heads)]
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value, cotangent = (
    jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
  )
  return (query, key, value), cotangent


def decoder(settings):
  """Yields each way for rows of one example, packed rows and rows with two answers."""
  rows, length, heads, width = (2, 64, 4, 16) if settings["tiny"] else (4, 2048, 32, 128)
  inner = 1 if settings["tiny"] else 10
  index = jnp.arange(length)
  for kv_heads in (heads, heads // 4):
    arrays, cotangent = draw(rows, length, heads, kv_heads, width)
    for kind in ("single", "packed", "branches"):
      segments, branches = rows_of(kind, rows, length)
      layout = tiles.Layout(segments, branches)
      mask = tiles.visible(layout, layout, index, index)
      expected = expect(arrays, cotangent, mask)
      flops = 2 * rows * heads * length**2 * width
      for name, way in candidates(kind, kv_heads == heads).items():
        what = f"{heads}/{kv_heads} {kind}: {name}"
        try:
          yield {"what": what} | measure(
            way, arrays, (layout, mask), cotangent, expected, flops, inner
          )
        except Exception as error:  # each way may fail in its own manner
          yield {"what": what} | timing.problem(error)


def tower(settings):
  """Yields each way for the vision tower, whose 577 tokens cuDNN wants padded."""
  rows, length, heads, width = (2, 37, 4, 16) if settings["tiny"] else (16, 577, 16, 64)
  inner = 1 if settings["tiny"] else 20
  arrays, cotangent = draw(rows, length, heads, heads, width)
  expected = expect(arrays, cotangent, None)
  ways = {
    f"ours {name}": functools.partial(attention.attend, backend=name)
    for name in (backends.AUTO, backends.TILES)
  }
  for multiple in (2, 8, 64):
    for how in ("lengths", "mask"):
      ways[f"cudnn, padded to {multiple}s, {how}"] = functools.partial(
        padded, multiple=multiple, how=how, implementation="cudnn"
      )
  ways["xla"] = functools.partial(padded, multiple=1, how="mask", implementation="xla")
  flops = 4 * rows * heads * length**2 * width
  for name, way in ways.items():
    try:
      yield {"what": name} | measure(way, arrays, (), cotangent, expected, flops, inner)
    except Exception as error:  # each way may fail in its own manner
      yield {"what": name} | timing.problem(error)


def padded(query, key, value, *, multiple: int, how: str, implementation: str):
  """Attention without causality over tokens padded to a multiple."""
  rows, length = query.shape[:2]
  more = -length % multiple
  query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
  options = {}
  if more and how == "lengths":
    options["key_value_seq_lengths"] = jnp.full(rows, length, jnp.int32)
  elif more:
    there = jnp.arange(length + more) < length
    options["mask"] = jnp.broadcast_to(there, (1, 1, length + more, length + more))
  found = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **options)
  return found[:, :length]
