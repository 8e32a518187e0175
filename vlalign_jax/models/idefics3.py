"""The vision transformer of Idefics3 and SmolVLM: SigLIP's with the norm after its last layer."""

import dataclasses

from vlalign_jax.models import siglip


@dataclasses.dataclass(frozen=True)
class VisionConfig(siglip.VisionConfig):
  """Has the fields of SigLIP's; the kind is known by the class."""


@dataclasses.dataclass(frozen=True)
class SmolVLMVisionConfig(VisionConfig):
  """The same tower in a SmolVLM."""
