"""Compiles small programs with known collectives for eight CPU devices; test_hlo runs it.

python -m tests.hlo.compiled_loops

Writes one JSON object: program -> what `collectives` counts in it.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlalign_jax.hlo import collectives, loops, operations
from vlalign_jax.hlo.parser import parse

DEVICES, SIZE, STEPS, OUTER = 8, 64, 5, 3


def psum_in_scan(mesh):
  """Returns OUTER x STEPS sums of float32[SIZE], each with a product of [SIZE, SIZE]."""

  def local(x, w):
    def body(x, _):
      return jax.lax.psum(w @ x, "x") * 0.01, None

    def outer(x, _):
      return jax.lax.scan(body, x, None, length=STEPS)[0], None

    return jax.lax.scan(outer, x, None, length=OUTER)[0]

  spec = PartitionSpec()
  program = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
  return program, [((SIZE,), spec), ((SIZE, SIZE), spec)]


def ring(mesh):
  """Returns STEPS permutations of float32[SIZE], and one that moves nothing."""

  def local(x):
    around = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
    stay = [(i, i) for i in range(DEVICES)]

    def body(i, x):
      return jax.lax.ppermute(x, "x", around) + i

    return jax.lax.ppermute(jax.lax.fori_loop(2, 2 + STEPS, body, x), "x", stay)

  spec = PartitionSpec("x")
  program = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return program, [((DEVICES * SIZE,), spec)]


def gather_layers(mesh):
  """Returns STEPS layers split over the devices, each gathered before its product."""
  replicated = NamedSharding(mesh, PartitionSpec())

  def program(x, layers):
    def body(x, layer):
      layer = jax.lax.with_sharding_constraint(layer, replicated)
      return jnp.tanh(x @ layer), None

    return jax.lax.scan(body, x, layers)[0]

  shapes = [((DEVICES, SIZE), PartitionSpec("x"))]
  return program, [*shapes, ((STEPS, SIZE, SIZE), PartitionSpec(None, "x"))]


def until_data_says(mesh):
  """Returns a sum in a loop whose count depends on data."""

  def local(x, n):
    return jax.lax.fori_loop(0, n[0], lambda i, x: jax.lax.psum(x, "x") / DEVICES, x)

  spec = PartitionSpec()
  program = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
  return program, [((SIZE,), spec), ((1,), spec)]


def up_to_counter(mesh):
  """Returns products of [SIZE, SIZE]: n in turn n of STEPS; then as many as an array says."""

  def local(x, w):
    def inner(count, x):
      return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(w @ x), x)

    limits = jnp.asarray([n * n % 7 for n in range(STEPS)])  # as another loop may save them
    x = jax.lax.fori_loop(0, STEPS, lambda i, x: inner(i + 1, x), x)
    return jax.lax.scan(lambda x, limit: (inner(limit, x), None), x, limits)[0]

  spec = PartitionSpec()
  program = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
  return program, [((SIZE,), spec), ((SIZE, SIZE), spec)]


def scatter(mesh):
  """Returns one sum over the devices, of which each keeps its part, and one exchange."""

  def local(x):
    x = jax.lax.psum_scatter(x, "x", tiled=True)
    return jax.lax.all_to_all(x, "x", 0, 0, tiled=True)

  program = jax.shard_map(
    local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("x"), check_vma=False
  )
  return program, [((DEVICES * SIZE,), PartitionSpec())]


def main() -> None:
  jax.config.update("jax_num_cpu_devices", DEVICES)
  mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
  counts = {}
  for make in (psum_in_scan, ring, gather_layers, until_data_says, up_to_counter, scatter):
    function, arguments = make(mesh)
    shapes = [
      jax.ShapeDtypeStruct(
        shape,
        jnp.int32 if shape == (1,) else jnp.float32,
        sharding=NamedSharding(mesh, spec),
      )
      for shape, spec in arguments
    ]
    program = parse(jax.jit(function).lower(*shapes).compile().as_text())
    trips = loops.Trips(to_unknown=7, to_counter=(STEPS + 1) / 2)
    counts[make.__name__] = {
      "flops": operations.flops(program, trips),
      **{
        kind: [traffic.count, traffic.bytes]
        for kind, traffic in collectives.traffic(program, DEVICES, trips).items()
      },
    }
  print(json.dumps(counts))


if __name__ == "__main__":
  main()
