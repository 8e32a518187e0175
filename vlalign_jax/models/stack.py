"""A stack of equal layers: parameters carry a layer axis, one compiled body runs them all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vlalign_jax.models import lora
from vlalign_jax.sharding.mesh import constrain_rows

REMAT_POLICIES = {
  # Name in `model.remat` -> what the backward pass finds saved instead of computing it again.
  "full": jax.checkpoint_policies.nothing_saveable,
  "save_matmuls": jax.checkpoint_policies.dots_saveable,
  "save_weight_matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT_NAMES = ("none", *REMAT_POLICIES)


def build_stack(make_layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs):
  """Builds `layers` independent copies of a module, stacked along a new first parameter axis."""
  return nnx.vmap(make_layer, in_axes=(0,), out_axes=0)(rngs.split(layers))


@jax.custom_vjp
def cast_in_loop(param):
  """The parameter itself.

  XLA for TPUs turns float32 values that are only ever read as bfloat16 into bfloat16 ones, through
  loops: it would cast the parameters of all layers before the first and keep them twice. It does
  not look through bits.
  """
  if param.dtype != jnp.float32:
    return param
  bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(param, jnp.uint32))
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


cast_in_loop.defvjp(lambda param: (cast_in_loop(param), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def _layer_of(layer, stack, index):
  """stack[index], read in the loop; its gradient is that of `layer`, which is the same."""
  stack, index = jax.lax.optimization_barrier((stack, index))
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


_layer_of.defvjp(
  lambda layer, stack, index: (_layer_of(layer, stack, index), None),
  lambda _, cotangent: (cotangent, None, None),
)


def in_loop(stacked, mesh: jax.sharding.Mesh | None):
  """What to scan so that arrays are cast a layer at a time.

  XLA for CPUs computes in float32 what has 16 bits, and casts whole stacks ahead of the loop: 28 GB
  for a model of 14. It cannot where the stack is not known before the loop turns.

  Args:
    stacked: tree of arrays [L, ...].
    mesh: over which the program runs.

  Returns:
    (what is to be scanned, function that makes of its slice the tree of one layer).
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  leaves = jax.tree.leaves(stacked)
  if platform != "cpu" or not any(leaf.dtype.itemsize == 2 for leaf in leaves):
    return stacked, lambda layer: layer
  held = jax.lax.stop_gradient(stacked)

  def layer_of(scanned):
    layer, index = scanned
    return jax.tree.map(
      lambda one, stack: _layer_of(one, stack, index) if stack.dtype.itemsize == 2 else one,
      layer,
      held,
    )

  return (stacked, jnp.arange(len(leaves[0]))), layer_of


def run_stack(
  layers: nnx.Module,
  x,
  call,
  *,
  remat: str,
  mesh: jax.sharding.Mesh | None = None,
  collect: bool = False,
  dropout_key: jax.Array | None = None,
):
  """Applies stacked layers one after the other.

  Args:
    layers: what `build_stack` returned.
    x: the array that enters the first layer; every layer keeps its shape.
    call: `(layer, x) -> x`.
    remat: one of REMAT_NAMES.
    mesh: over which the first axis of x is split.
    collect: also return each layer's output.
    dropout_key: for the dropout of adapters, each layer's its own; None: without.

  Returns:
    The last layer's output, and the outputs of all layers [L, ...] (None unless `collect`).
  """
  graphdef, params = nnx.split(layers)
  keys = None
  if dropout_key is not None and lora.drops(layers):
    keys = jax.random.split(dropout_key, len(jax.tree.leaves(params)[0]))

  params, layer_of = in_loop(params, mesh)

  def body(x, scanned):
    layer_params, key = scanned
    layer_params = layer_of(layer_params)
    x = constrain_rows(x, mesh)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(cast_in_loop, layer_params)
    x = call(lora.with_dropout(nnx.merge(graphdef, layer_params), key), x)
    return x, (x if collect else None)

  if remat != "none":
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return jax.lax.scan(body, x, (params, keys))
