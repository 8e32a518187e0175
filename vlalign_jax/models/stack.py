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

  def body(x, scanned):
    layer_params, key = scanned
    x = constrain_rows(x, mesh)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(cast_in_loop, layer_params)
    x = call(lora.with_dropout(nnx.merge(graphdef, layer_params), key), x)
    return x, (x if collect else None)

  if remat != "none":
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return jax.lax.scan(body, x, (params, keys))
