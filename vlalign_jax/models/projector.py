"""Projectors map the vision tower's features to the language model's embedding space."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.errors import InputError
from vlalign_jax.models import activations, perceiver, pixel_shuffle, vit
from vlalign_jax.models.linear import Linear
from vlalign_jax.sharding.mesh import constrain_rows

PROJECTORS = ("linear", "mlp", "vit", "perceiver")  # of new models
FAMILY_PROJECTORS = ("norm_mlp", "joined_linear")  # of families, see `pixel_shuffle`


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  kind: str  # one of PROJECTORS or FAMILY_PROJECTORS
  in_width: int
  out_width: int
  activation: str = "gelu"  # of `mlp` and `norm_mlp`
  use_bias: bool = True  # of linear maps
  newline: bool = False  # whether there is an embedding of the end of a line of patches
  joined: int = 1  # side of the squares of patches that become one embedding


def tokens_per_image(config: ProjectorConfig, vision: vit.VisionConfig) -> int:
  """Returns the number of embeddings per image."""
  if config.kind == "perceiver":
    return perceiver.QUERIES
  return vision.tokens_per_image // config.joined**2


def check(config: ProjectorConfig, vision: vit.VisionConfig, where: str) -> None:
  """Raises InputError if the projector does not fit the vision tower and the language model."""
  if config.kind not in PROJECTORS + FAMILY_PROJECTORS:
    kinds = ", ".join(PROJECTORS)
    raise InputError(f"{where}: projector {config.kind!r}; choose from {kinds}")
  activations.check(config.activation, where)
  if config.joined > 1 and vision.tokens_per_image != vision.patches:
    raise InputError(
      f"{where}: {vision.tokens_per_image} embeddings of {vision.patches} patches, and this "
      "projector joins squares of patches; correct vision_feature_select_strategy"
    )
  if config.joined > 1 and (vision.image_size // vision.patch_size) % config.joined:
    raise InputError(
      f"{where}: the projector joins squares of {config.joined} x {config.joined} patches, and the "
      f"vision tower has {vision.image_size // vision.patch_size} in a line"
    )
  if config.kind == "vit" and len(vision.feature_layers) > 1:
    raise InputError(
      f"{where}: the vit projector takes the features of one layer of the vision tower, but "
      f"vision_feature_layer names {len(vision.feature_layers)}: give one"
    )
  if config.kind == "perceiver" and not (vision.class_tokens or vision.keep_class_token):
    raise InputError(
      f"{where}: the perceiver projector takes all patches, and vision_feature_select_strategy "
      "'default' leaves out the first of a vision tower without a class token: give 'full'"
    )
  if config.kind == "perceiver" and config.out_width % perceiver.HEAD_DIM:
    raise InputError(
      f"{where}: the perceiver projector has heads of {perceiver.HEAD_DIM}, and the language "
      f"model's width {config.out_width} is not a multiple of that; choose another projector"
    )


def _linear_and_norm(config: ProjectorConfig, rngs: nnx.Rngs, **types):
  widths = config.in_width, config.out_width
  linear = Linear(*widths, use_bias=config.use_bias, rngs=rngs, **types)
  norm = nnx.LayerNorm(widths[1], epsilon=1e-12, use_fast_variance=False, rngs=rngs, **types)
  return linear, norm


class LinearProjector(nnx.Module):
  """Linear map and LayerNorm: Vision-LLM-Alignment's "baseline"."""

  def __init__(self, config: ProjectorConfig, vision, *, rngs: nnx.Rngs, **types):
    self.linear, self.norm = _linear_and_norm(config, rngs, **types)

  def __call__(self, features, mesh: Mesh | None = None):
    return self.norm(constrain_rows(self.linear(features), mesh))


class MlpProjector(nnx.Module):
  """Linear, activation, linear: LLaVA-1.5 (Liu et al. 2023, "Improved baselines")."""

  def __init__(self, config: ProjectorConfig, vision, *, rngs: nnx.Rngs, **types):
    types["use_bias"] = config.use_bias
    self.activation = config.activation
    self.first = Linear(config.in_width, config.out_width, rngs=rngs, **types)
    self.second = Linear(config.out_width, config.out_width, rngs=rngs, **types)

  def __call__(self, features, mesh: Mesh | None = None):
    hidden = constrain_rows(self.first(features), mesh)
    return constrain_rows(self.second(activations.ACTIVATIONS[self.activation](hidden)), mesh)


class VitProjector(nnx.Module):
  """One more layer like the vision tower's, then linear map and LayerNorm."""

  def __init__(self, config: ProjectorConfig, vision, *, rngs: nnx.Rngs, **types):
    self.block = vit.VisionLayer(vision, *vit.parts(vision, **types), rngs)
    self.linear, self.norm = _linear_and_norm(config, rngs, **types)

  def __call__(self, features, mesh: Mesh | None = None):
    features = constrain_rows(self.block(constrain_rows(features, mesh), mesh), mesh)
    return self.norm(constrain_rows(self.linear(features), mesh))


def build_projector(
  config: ProjectorConfig, vision: vit.VisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs
) -> nnx.Module:
  """Builds a projector.

  Args:
    config: of the projector.
    vision: config of the vision tower.
    dtype: of activations.
    param_dtype: of parameters.
    rngs: for the initial parameters.

  Returns:
    A module `(features, mesh=None)` that maps [N, P, in_width] to [N, `tokens_per_image`,
    out_width]; the mesh splits N. With `config.newline` it has `newline` [out_width].
  """
  kinds = {
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "vit": VitProjector,
    "perceiver": perceiver.PerceiverProjector,
    "norm_mlp": pixel_shuffle.NormMlpProjector,
    "joined_linear": pixel_shuffle.JoinedLinearProjector,
  }
  projector = kinds[config.kind](config, vision, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
  if config.newline:
    normal = nnx.initializers.normal(config.out_width**-0.5)
    projector.newline = nnx.Param(normal(rngs.params(), (config.out_width,), param_dtype))
  return projector
