"""The vision-language model: vision tower, projector and language model over rows."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax.models import backends
from vlalign_jax.models import lora as adapters
from vlalign_jax.models.clip import VisionConfig, VisionTower
from vlalign_jax.models.llama import LanguageConfig, LanguageModel
from vlalign_jax.models.projector import ProjectorConfig, build_projector, tokens_per_image

# What a model says at a position: the next token, or, of reward models and critics, one number.
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
      dtype: of activations and matrix products; norms and softmax keep float32 statistics.
      param_dtype: of the parameters.
      remat: what the backward pass computes again, see `stack.REMAT_NAMES`.
      mesh: over which rows are split.
      attention: the kernel of attention, see `backends.ATTENTION_NAMES`.
      rngs: for the initial parameters.
    """
    self.config = config
    self.options = {"remat": remat, "mesh": mesh, "attention": attention}
    types = {"dtype": dtype, "param_dtype": param_dtype}
    self.vision = VisionTower(config.vision, rngs=rngs, **types)
    self.projector = build_projector(config.projector, config.vision, rngs=rngs, **types)
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

  def image_tokens(self, rows):
    """bool[B, T], which tokens are an image's, where attention asks for it; else None."""
    return rows["image_slots"] >= 0 if self.config.mmca else None

  def vision_features(self, images, dropout_key=None):
    """What the vision tower makes of the images of rows.

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

  def image_features(self, rows, dropout_key=None):
    """Image embeddings of each row, in slot order.

    Args:
      rows: has `images`, see `vision_features`; `vision_features`, if there, are not made again.
      dropout_key: see `__call__`.

    Returns:
      [B, I * P, D] with P = config.tokens_per_image.
    """
    vision_key, projector_key = (
      (None, None) if dropout_key is None else jax.random.split(dropout_key)
    )
    features = rows.get("vision_features")
    if features is None:
      features = self.vision_features(rows["images"], vision_key)
    projector = adapters.with_dropout(self.projector, projector_key)
    # Those of rows come row by row, [B, I, P, W].
    features = projector(features.reshape(-1, *features.shape[-2:]), self.options["mesh"])
    return features.reshape(rows["images"].shape[0], -1, features.shape[-1])

  def embed(self, rows, dropout_key=None):
    """Token embeddings [B, T, D] of rows, image embeddings in their places.

    Args:
      rows: as of `__call__`; `image_features` [B, I * P, D], if there, are taken for `images`.
      dropout_key: for the dropout of adapters before the language model.
    """
    x = self.language.embed(rows["tokens"])
    features = rows.get("image_features")
    if features is None and rows["images"].shape[1]:
      features = self.image_features(rows, dropout_key)
    if features is None or not features.shape[1]:
      return x
    slots = rows["image_slots"][:, :, None]
    found = jnp.take_along_axis(features.astype(x.dtype), jnp.maximum(slots, 0), axis=1)
    return jnp.where(slots >= 0, found, x)

  def __call__(self, rows):
    """Hidden states of rows, from which `head_kernel` makes logits.

    Args:
      rows: the dict of ARCHITECTURE.md, "Rows"; `images` may have I = 0. In training it
        may also hold `dropout_key`, a jax.random key for the dropout of adapters.

    Returns:
      [B, T, D] after the final norm.
    """
    key = rows.get("dropout_key")
    image_key, key = (None, None) if key is None else jax.random.split(key)
    x = self.embed(rows, image_key)
    places = (rows[name] for name in ("positions", "segments", "branches"))
    images = self.image_tokens(rows)
    return self.language(x, *places, images=images, dropout_key=key, **self.options)

  def head_kernel(self):
    """[D, V], see LanguageModel.head_kernel."""
    return self.language.head_kernel()

  def scores(self, hidden, places):
    """The score of each answer, read at its last token, as transformers' sequence classifiers do.

    Args:
      hidden: float[B, T, D] of `__call__`.
      places: int32[B, S, K] positions in each row; those below 0 give a score that means nothing.

    Returns:
      float32[B, S, K].
    """
    B, S, K = places.shape
    flat = jnp.maximum(places, 0).reshape(B, S * K, 1)
    found = jnp.take_along_axis(hidden, flat, axis=1)
    kernel = self.score.kernel[...][:, 0].astype(found.dtype)
    scores = jnp.einsum("BND,D->BN", found, kernel, preferred_element_type=jnp.float32)
    return scores.reshape(B, S, K)


def abstract_params(config: ModelConfig, **options):
  """The model's structure without any arrays.

  Args:
    config: the architecture.
    **options: dtype, param_dtype, remat, mesh and attention of VisionLanguageModel.

  Returns:
    (graphdef, nested dict of jax.ShapeDtypeStruct); `nnx.merge(graphdef, params)` is the model.
  """
  model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), **options))
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def logits(model: VisionLanguageModel, rows):
  """float32[B, T, V] for every position: for small models and tests, never for training."""
  hidden = model(rows)
  kernel = model.head_kernel().astype(hidden.dtype)
  return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: jax.Array, **options):
  """(graphdef, nested dict of freshly initialized arrays); call under `jax.jit` to shard."""
  model = VisionLanguageModel(config, rngs=nnx.Rngs(params=key), **options)
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)
