"""What the forward pass saves for the backward pass, and what one layer works with, in bytes."""

import dataclasses
import math

import jax.numpy as jnp

from vlalign_jax.models.vlm import SCORE, ModelConfig
from vlalign_jax.planning.learning import Learning, Map
from vlalign_jax.planning.workload import Workload, tile_pairs

# Arrays of a tile's scores that the backward pass has at a time: weights, and two gradients.
_TILES = 3


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Widths of a transformer layer, as one device has them."""

  width: int
  heads: float
  head_dim: int
  kv_heads: float
  mlp_width: float
  gated: bool
  # Of its adapters: the sum of their ranks, and of the outputs of those that are needed again.
  ranks: int = 0
  adapted: float = 0.0
  # Of attention, where `save_matmuls` sees its products: not in loops that stop at the diagonal,
  # nor in a TPU's kernel, both of which are the language model's.
  pairs: float = 0.0  # (query, key) pairs that are computed, per token
  parts: float = 0.0  # tiles of keys per tile of queries

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
      return size * (2 * self.width + 3 * query + keys + mlp + self.ranks) + 4 * statistics
    saved = size * (2 * self.width + query + keys + (1 + self.gated) * self.mlp_width)
    # A map's product and its adapter's are saved, and not their sum.
    saved += size * (self.ranks + self.adapted)
    if remat == "save_matmuls":  # tiles of scores and mixed values are products, too
      saved += 4 * (self.heads * self.pairs + query * self.parts)
    return saved


def _adapters(maps: dict[str, Map], tensor: int) -> dict:
  """Of one layer. What the last map gives is never needed again; inputs of `out` are split."""
  needed = {path: found for path, found in maps.items() if not path.endswith("/mlp/down")}
  split = {path: 1 if path.endswith("/out") else tensor for path in needed}
  return {
    "ranks": sum(found.rank for found in maps.values()),
    "adapted": sum(found.outputs / split[path] for path, found in needed.items() if found.rank),
  }


def language_layer(model: ModelConfig, learns: Learning, tensor: int) -> _Layer:
  language = model.language
  return _Layer(
    width=language.width,
    heads=language.heads / tensor,
    head_dim=language.head_dim,
    kv_heads=language.kv_heads / tensor,
    mlp_width=language.mlp_width / tensor,
    gated=True,
    **_adapters(learns.under("language/layers/"), tensor),
  )


def vision_layer(model: ModelConfig, workload: Workload, learns: Learning) -> _Layer:
  vision, tokens = model.vision, model.vision.patches + 1
  return _Layer(
    width=vision.width,
    heads=vision.heads,
    head_dim=vision.width // vision.heads,
    kv_heads=vision.heads,
    mlp_width=vision.mlp_width,
    gated=False,
    **_adapters(learns.under("vision/layers/"), 1),
    pairs=tile_pairs(tokens, workload.tile, causal=False) / tokens,
    parts=math.ceil(tokens / workload.tile),
  )


def saved(config, model: ModelConfig, workload: Workload, learns: Learning, tensor: int) -> float:
  """Bytes that all layers save for the backward pass of a micro-batch, on one device."""
  remat, size = config.model.remat, jnp.dtype(config.model.dtype).itemsize
  images = workload.device_rows * workload.images
  total = 0.0
  if learns.language:
    widths = language_layer(model, learns, tensor).saved(remat, size) * model.language.layers
    total += widths * workload.device_rows * workload.length
  if learns.any("vision/"):
    widths = vision_layer(model, workload, learns).saved(remat, size) * model.vision.layers
    total += widths * images * (model.vision.patches + 1)
  if learns.any("projector/"):
    total += images * _projector(model, workload, learns, size)
  return total


def _projector(model: ModelConfig, workload: Workload, learns: Learning, size: int) -> float:
  """Bytes that an image leaves behind in the projector; of a perceiver a rough count."""
  projector, tokens = model.projector, model.tokens_per_image
  if projector.kind == "perceiver":  # what is read has three maps behind it, queries four
    reads = model.vision.patches * (projector.in_width + 4 * projector.out_width)
    return size * (reads + 5 * tokens * projector.out_width)
  block = 0.0
  if projector.kind == "vit":
    block = vision_layer(model, workload, learns).saved("none", size)
  return tokens * (size * (projector.in_width + 2 * projector.out_width) + block)


def working(config, model: ModelConfig, workload: Workload, learns: Learning, tensor: int) -> float:
  """Bytes that come and go beside what is saved: the larger of head and layer."""
  language, size = model.language, jnp.dtype(config.model.dtype).itemsize
  tokens = workload.device_rows * workload.length
  head = 3 * tokens * language.width * size  # hidden states, in order, and their gradient
  if model.head != SCORE:
    kernel = language.width * language.vocab_size / tensor
    chunk = min(1024, tokens) * language.vocab_size / tensor
    trained = learns.any("language/head/", "language/embedding/")
    head += kernel * (size + 4 * trained) + chunk * (2 * 4 + size)

  layer = language_layer(model, learns, tensor)
  # About half of what a layer would save is there at a time, as compiled programs show.
  backward = tokens * layer.saved("none", size) / 2
  backward += 4 * tokens * (layer.heads + 2 * layer.kv_heads) * layer.head_dim  # of q, k and v
  if not workload.has_kernel:
    tile = min(workload.tile, workload.length)
    backward += 4 * _TILES * workload.device_rows * layer.heads * tile**2
  # Gradients before they are split.
  of_layers = sum(found.size * found.trained for found in learns.under("language/layers/").values())
  backward += size * of_layers / language.layers / tensor
  return max(head, backward)
