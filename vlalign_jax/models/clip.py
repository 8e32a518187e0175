"""CLIP's vision transformer (Radford et al. 2021), up to the last layer that features come from."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from vlalign_jax.models import stack, vit
from vlalign_jax.sharding.mesh import constrain_rows


@dataclasses.dataclass(frozen=True)
class VisionConfig(vit.VisionConfig):
  class_tokens: ClassVar[int] = 1

  def build(self, *, dtype, param_dtype, rngs: nnx.Rngs) -> "VisionTower":
    """Builds the module."""
    return VisionTower(self, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class VisionTower(vit.VisionTower):
  """Has a class token before the patches, and a norm before the first layer."""

  def __init__(self, config: VisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    linear, norm = vit.parts(config, dtype=dtype, param_dtype=param_dtype)
    # Kernel of the patch convolution, flattened in the order row, column, channel.
    self.patch_embedding = linear(config.patch_size**2 * 3, config.width, use_bias=False, rngs=rngs)
    normal = nnx.initializers.normal(config.width**-0.5)
    self.class_embedding = nnx.Param(normal(rngs.params(), (config.width,), param_dtype))
    self.position_embedding = nnx.Param(
      normal(rngs.params(), (config.tokens, config.width), param_dtype)
    )
    self.input_norm = norm(config.width, rngs=rngs)
    if config.layers:
      self.layers = stack.build_stack(
        lambda rngs: vit.VisionLayer(config, linear, norm, rngs), config.layers, rngs
      )

  def embed(self, patches, mesh):
    x = constrain_rows(self.patch_embedding(patches), mesh)
    first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(self.dtype)
    return self.input_norm(x)
