"""A stack of equal layers: parameters have a layer axis, and one compiled body runs all layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vlalign_jax.models import lora
from vlalign_jax.sharding.mesh import constrain_rows

REMAT_POLICIES = {
  # Name in `model.remat` -> what the forward pass saves; the backward pass computes the rest again.
  "full": jax.checkpoint_policies.nothing_saveable,
  "save_matmuls": jax.checkpoint_policies.dots_saveable,
  "save_weight_matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT_NAMES = ("none", *REMAT_POLICIES)


def build_stack(make_layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs):
  """Builds `layers` independent modules, stacked along a new first axis of their parameters."""
  return nnx.vmap(make_layer, in_axes=(0,), out_axes=0)(rngs.split(layers))


@jax.custom_vjp
def cast_in_loop(param):
  """Returns the parameter unchanged, in a form that XLA cannot cast before the loop.

  XLA for TPUs replaces float32 values that are only used as bfloat16 by bfloat16 ones, even outside
  the loop that uses them: it would cast the parameters of all layers before the first layer and
  keep both copies. It does not do so across a bitcast.
  """
  if param.dtype != jnp.float32:
    return param
  bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(param, jnp.uint32))
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


cast_in_loop.defvjp(lambda param: (cast_in_loop(param), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def _index_stack(layer, stack, index):
  """Returns stack[index], read inside the loop; `layer`, its equal, gets the gradient."""
  stack, index = jax.lax.optimization_barrier((stack, index))
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


_index_stack.defvjp(
  lambda layer, stack, index: (_index_stack(layer, stack, index), None),
  lambda _, cotangent: (cotangent, None, None),
)


def in_loop(stacked, mesh: jax.sharding.Mesh | None):
  """Prepares stacked arrays for a scan in which they are cast one layer at a time.

  XLA for CPUs computes 16-bit values in float32, and casts a stack of layers before the loop: that
  takes 28 GB for a model of 14 GB. It cannot do so for a stack that is only known inside the loop.

  Args:
    stacked: tree of arrays [L, ...].
    mesh: of the program.

  Returns:
    (tree to scan, function from its slice to the tree of one layer).
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  leaves = jax.tree.leaves(stacked)
  if platform != "cpu" or not any(leaf.dtype.itemsize == 2 for leaf in leaves):
    return stacked, lambda layer: layer
  constant = jax.lax.stop_gradient(stacked)

  def select_layer(scanned):
    layer, index = scanned
    return jax.tree.map(
      lambda x, stack: _index_stack(x, stack, index) if stack.dtype.itemsize == 2 else x,
      layer,
      constant,
    )

  return (stacked, jnp.arange(len(leaves[0]))), select_layer


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
    layers: from `build_stack`.
    x: input of the first layer; every layer keeps its shape.
    call: `(layer, x) -> x`.
    remat: one of REMAT_NAMES.
    mesh: splits the first axis of x.
    collect: whether to return each layer's output, too.
    dropout_key: for the dropout of adapters, split by layer; None: no dropout.

  Returns:
    The last layer's output, and the outputs of all layers [L, ...] (None unless `collect`).
  """
  graphdef, params = nnx.split(layers)
  keys = None
  if dropout_key is not None and lora.drops(layers):
    keys = jax.random.split(dropout_key, len(jax.tree.leaves(params)[0]))

  params, select_layer = in_loop(params, mesh)

  def body(x, scanned):
    layer_params, key = scanned
    layer_params = select_layer(layer_params)
    x = constrain_rows(x, mesh)
    if mesh is not None and mesh.size > 1:
      layer_params = jax.tree.map(cast_in_loop, layer_params)
    x = call(lora.with_dropout(nnx.merge(graphdef, layer_params), key), x)
    return x, (x if collect else None)

  if remat != "none":
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return jax.lax.scan(body, x, (params, keys))
