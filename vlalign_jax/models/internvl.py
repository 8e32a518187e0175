"""InternVL's vision transformer (InternViT, Chen et al. 2024), up to the layer of its features.

Each branch of a layer has a learned scale for every channel (Touvron et al. 2021, "LayerScale").
"""

import dataclasses
from typing import ClassVar

from flax import nnx

from vlalign_jax.models import vit
from vlalign_jax.sharding.mesh import constrain_rows


@dataclasses.dataclass(frozen=True)
class VisionConfig(vit.VisionConfig):
  class_tokens: ClassVar[int] = 1

  def build(self, *, dtype, param_dtype, rngs: nnx.Rngs) -> "VisionTower":
    """Builds the module."""
    return VisionTower(self, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class VisionTower(vit.VisionTower):
  """Has a class token before the patches, which have a bias, and no norm before the first layer."""

  patch_bias = True
  has_input_norm = False

  def embed(self, patches, mesh):
    x = self.with_class_token(constrain_rows(self.patch_embedding(patches), mesh))
    return x + self.position_embedding[...].astype(self.dtype)
