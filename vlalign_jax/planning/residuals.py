"""What the forward pass saves for the backward pass, and what one layer works with, in bytes."""

import dataclasses
import math

import jax.numpy as jnp

from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning.workload import Workload, tile_pairs


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Widths of a transformer layer, as one device has them."""

  width: int
  heads: float
  head_dim: int
  kv_heads: float
  mlp_width: float
  gated: bool
  # Of attention, where its products are saved: else 0.
  pairs: float  # (query, key) pairs that are computed, per token
  parts: float  # tiles of keys per tile of queries

  def saved(self, remat: str, size: int) -> float:
    """Bytes that a token leaves behind in a layer for the backward pass.

    Counted in what `jax.vjp` saves of the models here; a test holds the two together.

    Args:
      remat: config.model.remat.
      size: bytes of an activation.
    """
    query, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
    if remat == "full":
      return size * self.width
    if remat == "none":  # norms and softmax keep float32 statistics
      mlp = (6 if self.gated else 4) * self.mlp_width
      statistics = 6 * self.width + self.heads + 4
      return size * (2 * self.width + 3 * query + keys + mlp) + 4 * statistics
    saved = size * (2 * self.width + query + keys + (1 + self.gated) * self.mlp_width)
    if remat == "save_matmuls":  # tiles of scores and mixed values are products, too
      saved += 4 * (self.heads * self.pairs + query * self.parts)
    return saved


def language_layer(model: ModelConfig, workload: Workload, tensor: int) -> _Layer:
  language = model.language
  tiles = math.ceil(workload.length / workload.tile)
  pairs = tile_pairs(workload.length, workload.tile, causal=True) / workload.length
  scores = workload.saves_scores("language")
  return _Layer(
    width=language.width,
    heads=language.heads / tensor,
    head_dim=language.head_dim,
    kv_heads=language.kv_heads / tensor,
    mlp_width=language.mlp_width / tensor,
    gated=True,
    pairs=scores * pairs,
    parts=scores * (tiles + 1) / 2,
  )


def vision_layer(model: ModelConfig, workload: Workload) -> _Layer:
  vision, tokens = model.vision, model.vision.patches + 1
  scores = workload.saves_scores("vision")
  return _Layer(
    width=vision.width,
    heads=vision.heads,
    head_dim=vision.width // vision.heads,
    kv_heads=vision.heads,
    mlp_width=vision.mlp_width,
    gated=False,
    pairs=scores * tile_pairs(tokens, workload.tile, causal=False) / tokens,
    parts=scores * math.ceil(tokens / workload.tile),
  )


def saved(config, model: ModelConfig, workload: Workload, tensor: int) -> float:
  """Bytes that all layers save for the backward pass of a micro-batch, on one device."""
  train, size = config.train, jnp.dtype(config.model.dtype).itemsize
  images = workload.device_rows * workload.images
  layer = language_layer(model, workload, tensor)
  widths = layer.saved(config.model.remat, size) * model.language.layers
  total = widths * workload.device_rows * workload.length
  if train.vision:
    widths = vision_layer(model, workload).saved(config.model.remat, size) * model.vision.layers
    total += widths * images * (model.vision.patches + 1)
  if train.projector:
    features = images * model.tokens_per_image
    total += size * features * (model.projector.in_width + 2 * model.projector.out_width)
  return total


def working(config, model: ModelConfig, workload: Workload, tensor: int) -> float:
  """Bytes that come and go beside what is saved: the larger of head and layer."""
  language, size = model.language, jnp.dtype(config.model.dtype).itemsize
  tokens = workload.device_rows * workload.length
  kernel = language.width * language.vocab_size / tensor
  chunk = min(1024, tokens) * language.vocab_size / tensor
  head = kernel * (size + 4 * config.train.language) + chunk * (2 * 4 + size)
  head += 3 * tokens * language.width * size  # hidden states, in order, and their gradient

  layer = language_layer(model, workload, tensor)
  # About half of what a layer would save is there at a time, as compiled programs show.
  backward = tokens * layer.saved("none", size) / 2
  backward += 4 * tokens * (layer.heads + 2 * layer.kv_heads) * layer.head_dim  # of q, k and v
  parameters = language.width * (
    2 * (layer.heads + layer.kv_heads) * layer.head_dim + 3 * layer.mlp_width
  )
  backward += size * parameters * config.train.language  # gradients before they are split
  return max(head, backward)
