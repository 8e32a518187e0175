"""SigLIP's vision transformer (Zhai et al. 2023), up to the last layer that features come from.

SigLIP 2 (Tschannen et al. 2025) at a fixed resolution is the same. The head that pools the patches
to one embedding, and the norm before it, come after the features and are not here.
"""

import dataclasses
from typing import ClassVar

from flax import nnx

from vlalign_jax.models import vit
from vlalign_jax.sharding.mesh import constrain_rows


@dataclasses.dataclass(frozen=True)
class VisionConfig(vit.VisionConfig):
  class_tokens: ClassVar[int] = 0

  def build(self, *, dtype, param_dtype, rngs: nnx.Rngs) -> "VisionTower":
    """Builds the module."""
    return VisionTower(self, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class VisionTower(vit.VisionTower):
  """Has only patches, with a bias, and no norm before the first layer."""

  patch_bias = True
  has_input_norm = False

  def embed(self, patches, mesh):
    x = constrain_rows(self.patch_embedding(patches), mesh)
    return x + self.position_embedding[...].astype(self.dtype)
