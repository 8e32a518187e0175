"""What vision transformers share: config, layers, and the features that are taken from these.

A tower has a module of its own, which says what enters the first layer (`clip`, `siglip`).
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import activations, attention, backends, stack
from vlalign_jax.models.linear import Linear
from vlalign_jax.sharding.mesh import constrain_rows, constrain_tensor


@dataclasses.dataclass(frozen=True)
class VisionConfig(abc.ABC):
  """Describes a tower; each kind of tower has a class, which is what the kind is known by."""

  width: int
  mlp_width: int
  layers: int  # layers to compute, the highest of feature_layers
  heads: int
  image_size: int
  patch_size: int
  activation: str
  norm_epsilon: float
  # The features are these hidden states, concatenated: 0 is the input of the first layer, l the
  # output of layer l.
  feature_layers: tuple[int, ...]
  # Whether features begin with the first embedding: the class token, or the first patch of a tower
  # without one.
  keep_class_token: bool
  qkv_bias: bool = True  # of the maps of query, key and value
  query_key_norm: bool = False  # RMSNorms of queries and keys, over the channels of all heads
  rms_norm: bool = False  # RMSNorms in layers, in place of LayerNorms
  layer_scale: float | None = None  # initial scale of each branch's channels; None: none
  output_norm: bool = False  # whether a norm follows the last layer, and features come after it
  class_tokens: ClassVar[int]  # embeddings before those of patches, in every hidden state

  @abc.abstractmethod
  def build(self, *, dtype, param_dtype, rngs: nnx.Rngs) -> "VisionTower":
    """Builds the tower's module."""

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def tokens(self) -> int:
    """Embeddings of a picture in the tower."""
    return self.patches + self.class_tokens

  @property
  def tokens_per_image(self) -> int:
    """Embeddings of a picture in the features."""
    return self.tokens - (not self.keep_class_token)

  @property
  def feature_width(self) -> int:
    return self.width * len(self.feature_layers)


class VisionAttention(nnx.Module):
  def __init__(self, config: VisionConfig, linear, rngs):
    self.heads = config.heads
    self.query = linear(config.width, config.width, use_bias=config.qkv_bias, rngs=rngs)
    self.key = linear(config.width, config.width, use_bias=config.qkv_bias, rngs=rngs)
    self.value = linear(config.width, config.width, use_bias=config.qkv_bias, rngs=rngs)
    self.out = linear(config.width, config.width, rngs=rngs)
    self.normed = config.query_key_norm
    if self.normed:
      types = {"dtype": self.query.dtype, "param_dtype": self.query.param_dtype}
      self.query_norm = nnx.RMSNorm(config.width, epsilon=1e-6, rngs=rngs, **types)
      self.key_norm = nnx.RMSNorm(config.width, epsilon=1e-6, rngs=rngs, **types)

  def __call__(self, x, mesh, attention_backend=backends.AUTO):
    def heads(projected):
      return constrain_tensor(projected.reshape(*x.shape[:-1], self.heads, -1), mesh, axis=2)

    query, key = self.query(x), self.key(x)
    if self.normed:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key, value = (heads(projected) for projected in (query, key, self.value(x)))
    attended = attention.attend(query, key, value, mesh=mesh, backend=attention_backend)
    return self.out(constrain_tensor(attended, mesh, axis=2).reshape(x.shape))


class VisionMlp(nnx.Module):
  def __init__(self, config: VisionConfig, linear, rngs):
    self.activation = config.activation
    self.up = linear(config.width, config.mlp_width, rngs=rngs)
    self.down = linear(config.mlp_width, config.width, rngs=rngs)

  def __call__(self, x, mesh):
    hidden = constrain_tensor(self.up(x), mesh, axis=2)
    return self.down(activations.ACTIVATIONS[self.activation](hidden))


class LayerScale(nnx.Module):
  """Scales each channel of a branch (Touvron et al. 2021)."""

  def __init__(self, width: int, initial: float, param_dtype):
    self.scale = nnx.Param(jnp.full(width, initial, param_dtype))

  def __call__(self, x):
    return x * self.scale[...].astype(x.dtype)


class VisionLayer(nnx.Module):
  def __init__(self, config: VisionConfig, linear, norm, rngs):
    self.attention_norm = norm(config.width, rngs=rngs)
    self.attention = VisionAttention(config, linear, rngs)
    self.mlp_norm = norm(config.width, rngs=rngs)
    self.mlp = VisionMlp(config, linear, rngs)
    self.scaled = config.layer_scale is not None
    if config.layer_scale is not None:
      arguments = config.width, config.layer_scale, self.mlp.up.param_dtype
      self.attention_scale, self.mlp_scale = LayerScale(*arguments), LayerScale(*arguments)

  def __call__(self, x, mesh, attention_backend=backends.AUTO):
    attended = self.attention(self.attention_norm(x), mesh, attention_backend)
    x = x + (self.attention_scale(attended) if self.scaled else attended)
    hidden = self.mlp(self.mlp_norm(x), mesh)
    return x + (self.mlp_scale(hidden) if self.scaled else hidden)


def parts(config: VisionConfig, **types):
  """Returns constructors (linear, norm) of a layer's modules; types: dtype and param_dtype."""
  normal = nnx.initializers.normal(config.width**-0.5)
  linear = functools.partial(Linear, kernel_init=normal, **types)
  if config.rms_norm:
    return linear, functools.partial(nnx.RMSNorm, epsilon=config.norm_epsilon, **types)
  return linear, layer_norm(config, **types)


def layer_norm(config: VisionConfig, **types):
  """Returns the constructor of a LayerNorm of the tower."""
  return functools.partial(
    nnx.LayerNorm, epsilon=config.norm_epsilon, use_fast_variance=False, **types
  )


class VisionTower(nnx.Module, abc.ABC):
  """Maps pixels to patch features.

  Attributes:
    patch_bias: whether the patch convolution has a bias.
    has_input_norm: whether there is a norm before the first layer.
  """

  patch_bias: ClassVar[bool]
  has_input_norm: ClassVar[bool]

  def __init__(self, config: VisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    linear, norm = parts(config, dtype=dtype, param_dtype=param_dtype)
    normal = nnx.initializers.normal(config.width**-0.5)

    def embedding(*shape):
      return nnx.Param(normal(rngs.params(), (*shape, config.width), param_dtype))

    # Kernel of the patch convolution, flattened in the order row, column, channel.
    inputs = config.patch_size**2 * 3
    self.patch_embedding = linear(inputs, config.width, use_bias=self.patch_bias, rngs=rngs)
    if config.class_tokens:
      self.class_embedding = embedding()
    self.position_embedding = embedding(config.tokens)
    types = {"dtype": dtype, "param_dtype": param_dtype}
    if self.has_input_norm:
      self.input_norm = layer_norm(config, **types)(config.width, rngs=rngs)
    if config.output_norm:
      self.output_norm = layer_norm(config, **types)(config.width, rngs=rngs)
    if config.layers:
      self.layers = stack.build_stack(
        lambda rngs: VisionLayer(config, linear, norm, rngs), config.layers, rngs
      )

  def with_class_token(self, x):
    """Returns [N, 1 + patches, D] for patches' embeddings [N, patches, D]."""
    first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (len(x), 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1)

  @abc.abstractmethod
  def embed(self, patches, mesh: Mesh | None):
    """Computes what enters the first layer.

    Args:
      patches: [N, config.patches, 3 * patch_size^2] in the tower's dtype, each patch flattened in
        the order row, column, channel.
      mesh: splits N.

    Returns:
      [N, config.tokens, config.width] in the tower's dtype.
    """

  def __call__(
    self,
    pixels,
    *,
    remat: str = "none",
    mesh: Mesh | None = None,
    attention: str = backends.AUTO,
    dropout_key=None,
  ):
    """Computes features of images.

    Args:
      pixels: float[N, H, W, 3], normalized, H = W = config.image_size.
      remat: see `stack.REMAT_NAMES`.
      mesh: splits N.
      attention: the kernel of attention, see `backends.ATTENTION_NAMES`.
      dropout_key: for the dropout of adapters; None: no dropout.

    Returns:
      [N, P, F] in the tower's dtype: P = config.tokens_per_image, F = config.feature_width.
    """
    config = self.config
    N, size, patch = pixels.shape[0], config.image_size, config.patch_size
    side = size // patch
    # Like a stride-p convolution with p x p kernels, drop incomplete patches at right and bottom.
    pixels = pixels[:, : side * patch, : side * patch].astype(self.dtype)
    patches = pixels.reshape(N, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = constrain_rows(patches.reshape(N, side * side, patch * patch * 3), mesh)
    x = self.embed(patches, mesh)

    several = len(config.feature_layers) > 1
    hidden: list[Any] = [x] if 0 in config.feature_layers else [None]
    if config.layers:
      outputs: Any
      last, outputs = stack.run_stack(
        self.layers,
        x,
        lambda layer, x: layer(x, mesh, attention),
        remat=remat,
        mesh=mesh,
        collect=several,
        dropout_key=dropout_key,
      )
      # Without `several`, the only feature layer is the last.
      hidden += [None] * (config.layers - 1) + [last] if not several else list(outputs)
    features = jnp.concatenate([hidden[layer] for layer in config.feature_layers], axis=-1)
    features = constrain_rows(features, mesh)
    if config.output_norm:
      features = self.output_norm(features)
    return features if config.keep_class_token else features[:, 1:]
