"""The vision-language model: vision tower, projector and language model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.image_slots import NEWLINE, TEXT
from vlalign_jax.models import backends
from vlalign_jax.models import lora as adapters
from vlalign_jax.models.llama import LanguageConfig, LanguageModel
from vlalign_jax.models.projector import ProjectorConfig, build_projector, tokens_per_image
from vlalign_jax.models.vit import VisionConfig

# What a model predicts at a position: the next token, or (reward models and critics) one number.
LANGUAGE, SCORE = "language", "score"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  vision: VisionConfig
  projector: ProjectorConfig
  language: LanguageConfig
  image_token_id: int
  # Pixels enter the tower as (value * rescale_factor - mean) / std.
  image_mean: tuple[float, float, float]
  image_std: tuple[float, float, float]
  rescale_factor: float = 1 / 255
  head: str = LANGUAGE
  mmca: bool = False  # multi-modal causal attention, see `models.attention`
  family: str = "llava"  # how pictures and text are put together, see `weights.families`
  most_tiles: int = 1  # of a picture
  lora: adapters.LoraConfig | None = None

  @property
  def tokens_per_image(self) -> int:
    return tokens_per_image(self.projector, self.vision)


class VisionLanguageModel(nnx.Module):
  def __init__(
    self,
    config: ModelConfig,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: str = "none",
    mesh: Mesh | None = None,
    attention: str = backends.AUTO,
    rngs: nnx.Rngs,
  ):
    """Builds the modules.

    Args:
      config: the architecture.
      dtype: of activations and matrix products; norms and softmax have float32 statistics.
      param_dtype: of the parameters.
      remat: what the backward pass computes again, see `stack.REMAT_NAMES`.
      mesh: splits rows.
      attention: the kernel of attention, see `backends.ATTENTION_NAMES`.
      rngs: for the initial parameters.
    """
    self.config = config
    self.options = {"remat": remat, "mesh": mesh, "attention": attention}
    types = {"dtype": dtype, "param_dtype": param_dtype}
    self.vision = config.vision.build(rngs=rngs, **types)
    self.projector: Any = build_projector(config.projector, config.vision, rngs=rngs, **types)
    self.language = LanguageModel(
      config.language, with_head=config.head == LANGUAGE, rngs=rngs, **types
    )
    if config.head == SCORE:
      self.score = nnx.Linear(
        config.language.width,
        1,
        use_bias=False,
        kernel_init=nnx.initializers.normal(config.language.width**-0.5),
        rngs=rngs,
        **types,
      )
    if config.lora:
      adapters.attach(self, config.lora, rngs)

  def image_tokens(self, batch):
    """Returns bool[B, T], image tokens, if attention needs them (config.mmca); otherwise None."""
    return batch["image_slots"] != TEXT if self.config.mmca else None

  def vision_features(self, images, dropout_key=None):
    """Computes the vision tower's features of images.

    Args:
      images: [B, I, H, W, 3]; uint8 as decoded and resized, or float already normalized.
      dropout_key: see `__call__`.

    Returns:
      [B * I, P, W] with P and W config.vision's tokens_per_image and feature_width.
    """
    pixels = images.reshape(-1, *images.shape[2:])
    if pixels.dtype == jnp.uint8:
      mean, std = jnp.array(self.config.image_mean), jnp.array(self.config.image_std)
      pixels = (pixels.astype(jnp.float32) * self.config.rescale_factor - mean) / std
    return self.vision(pixels, dropout_key=dropout_key, **self.options)

  def image_features(self, batch, dropout_key=None):
    """Computes the image embeddings of each row, in the order of `image_slots`.

    Args:
      batch: has `images`, and optionally their `vision_features`, which are then not computed.
      dropout_key: see `__call__`.

    Returns:
      [B, I * P, D] with P = config.tokens_per_image.
    """
    vision_key, projector_key = (
      (None, None) if dropout_key is None else jax.random.split(dropout_key)
    )
    features = batch.get("vision_features")
    if features is None:
      features = self.vision_features(batch["images"], vision_key)
    projector = adapters.with_dropout(self.projector, projector_key)
    # `vision_features` of a batch may be [B, I, P, W].
    features = projector(features.reshape(-1, *features.shape[-2:]), self.options["mesh"])
    return features.reshape(batch["images"].shape[0], -1, features.shape[-1])

  def embed(self, batch, dropout_key=None):
    """Returns embeddings [B, T, D]: of images at image tokens, of tokens elsewhere.

    Args:
      batch: see `__call__`; it may have `image_features` [B, I * P, D], used instead of `images`.
      dropout_key: for the dropout of adapters before the language model.
    """
    x = self.language.embed(batch["tokens"])
    features = batch.get("image_features")
    if features is None and batch["images"].shape[1]:
      features = self.image_features(batch, dropout_key)
    if features is None or not features.shape[1]:
      return x
    slots = batch["image_slots"][:, :, None]
    image_x = jnp.take_along_axis(features.astype(x.dtype), jnp.maximum(slots, 0), axis=1)
    x = jnp.where(slots >= 0, image_x, x)
    if not self.config.projector.newline:
      return x
    newline = self.projector.newline[...]
    return jnp.where(slots == NEWLINE, newline.astype(x.dtype), x)

  def __call__(self, batch):
    """Computes hidden states, which `head_kernel` maps to logits.

    Args:
      batch: dict of arrays, see ARCHITECTURE.md, "Rows"; `images` may have I = 0. In training it
        may also have `dropout_key`, a jax.random key for the dropout of adapters.

    Returns:
      [B, T, D] after the final norm.
    """
    key = batch.get("dropout_key")
    image_key, key = (None, None) if key is None else jax.random.split(key)
    x = self.embed(batch, image_key)
    layout = (batch[name] for name in ("positions", "segments", "branches"))
    images = self.image_tokens(batch)
    return self.language(x, *layout, images=images, dropout_key=key, **self.options)

  def head_kernel(self):
    """Returns [D, V], see LanguageModel.head_kernel."""
    return self.language.head_kernel()

  def scores(self, hidden, places):
    """Computes the score of each answer at its last token, as transformers' sequence classifiers.

    Args:
      hidden: float[B, T, D] of `__call__`.
      places: int32[B, S, K], indices in each row; below 0 the score is arbitrary.

    Returns:
      float32[B, S, K].
    """
    B, S, K = places.shape
    index = jnp.maximum(places, 0).reshape(B, S * K, 1)
    last = jnp.take_along_axis(hidden, index, axis=1)
    kernel = self.score.kernel[...][:, 0].astype(last.dtype)
    scores = jnp.einsum("BND,D->BN", last, kernel, preferred_element_type=jnp.float32)
    return scores.reshape(B, S, K)


def abstract_params(config: ModelConfig, **options):
  """Returns the model's structure without arrays.

  Args:
    config: the architecture.
    **options: dtype, param_dtype, remat, mesh and attention of VisionLanguageModel.

  Returns:
    (graphdef, nested dict of jax.ShapeDtypeStruct); `nnx.merge(graphdef, params)` is the model.
  """
  model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), **options))
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def logits(model: VisionLanguageModel, batch):
  """Returns float32[B, T, V] for every position: for small models and tests, not for training."""
  hidden = model(batch)
  kernel = model.head_kernel().astype(hidden.dtype)
  return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: jax.Array, **options):
  """Returns (graphdef, nested dict of initialized arrays); call under `jax.jit` to shard."""
  model = VisionLanguageModel(config, rngs=nnx.Rngs(params=key), **options)
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)
