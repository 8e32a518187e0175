"""From the vision tower's features to the language model's embedding space."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import activations
from vlalign_jax.sharding.mesh import constrain_rows

PROJECTORS = ("linear", "mlp")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  kind: str  # one of PROJECTORS
  in_width: int
  out_width: int
  activation: str = "gelu"
  use_bias: bool = True


class LinearProjector(nnx.Module):
  """Linear map and LayerNorm: Vision-LLM-Alignment's "baseline"."""

  def __init__(self, config: ProjectorConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    types = {"dtype": dtype, "param_dtype": param_dtype}
    self.linear = nnx.Linear(
      config.in_width, config.out_width, use_bias=config.use_bias, rngs=rngs, **types
    )
    self.norm = nnx.LayerNorm(
      config.out_width, epsilon=1e-12, use_fast_variance=False, rngs=rngs, **types
    )

  def __call__(self, features, mesh: Mesh | None = None):
    return self.norm(constrain_rows(self.linear(features), mesh))


class MlpProjector(nnx.Module):
  """Linear, activation, linear: LLaVA-1.5 (Liu et al. 2023, "Improved baselines")."""

  def __init__(self, config: ProjectorConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    types = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": config.use_bias}
    self.activation = config.activation
    self.first = nnx.Linear(config.in_width, config.out_width, rngs=rngs, **types)
    self.second = nnx.Linear(config.out_width, config.out_width, rngs=rngs, **types)

  def __call__(self, features, mesh: Mesh | None = None):
    hidden = constrain_rows(self.first(features), mesh)
    return constrain_rows(self.second(activations.ACTIVATIONS[self.activation](hidden)), mesh)


def build_projector(config: ProjectorConfig, *, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.Module:
  """A module that maps [N, P, in_width] to [N, P, out_width]; N is split over `mesh`, if given."""
  kinds = {"linear": LinearProjector, "mlp": MlpProjector}
  return kinds[config.kind](config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
