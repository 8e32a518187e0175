"""Floating-point operations of a step, counted by formula: 2 for a multiplication with its sum."""

import dataclasses

from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning.workload import Workload, tile_pairs

# Products of an attention tile: scores and mix; and in the backward pass the scores again, then
# gradients of weights, values, queries and keys.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# A TPU's kernel makes gradients of keys and values in one pass and those of queries in another,
# and computes scores and gradients of weights in both.
KERNEL_BACKWARD_PRODUCTS = 7


@dataclasses.dataclass(frozen=True)
class Work:
  """Operations of one part of the model in a step, over all devices."""

  forward: float
  backward: float
  recomputed: float = 0.0

  @property
  def total(self) -> float:
    return self.forward + self.backward + self.recomputed


def count(model: ModelConfig, workload: Workload, train, remat: str) -> dict[str, Work]:
  """Operations by part.

  A part that nothing below learns from has no backward pass; one that stays itself but passes
  gradients on has half of it. Attention is counted in the tiles that are computed, over whole rows:
  packing more examples into a row saves nothing on accelerators. The head is counted over all
  tokens; it runs over the learnt ones only, so this is an upper bound.

  Args:
    model: the architecture.
    workload: of the step.
    train: the config's `train` group.
    remat: config.model.remat.

  Returns:
    vision, projector, language, attention (the language model's tiles) and head.
  """
  language = model.language
  embeddings = train.language if train.embeddings is None else train.embeddings
  head_trains = embeddings if language.tied_embeddings else train.language
  # Gradients go down as far as something is trained.
  below_language = train.vision or train.projector or embeddings
  learns = below_language or train.language

  tokens = workload.tokens
  layers = 2 * tokens * language.layers * language_layer(language)
  # The last product of a layer, which is not needed again.
  down = 2 * tokens * language.layers * language.width * language.mlp_width
  pairs = workload.rows * tile_pairs(workload.length, workload.tile, causal=True)
  tiles = 2 * pairs * language.layers * language.heads * language.head_dim
  backward = KERNEL_BACKWARD_PRODUCTS if workload.platform == "tpu" else BACKWARD_PRODUCTS
  head = 2 * tokens * language.width * language.vocab_size
  return {
    "vision": _vision(model, workload, train, remat),
    "projector": _projector(model, workload, train),
    "language": Work(
      layers, layers * (learns + train.language), (layers - down) * (learns and remat == "full")
    ),
    "attention": Work(
      FORWARD_PRODUCTS * tiles,
      backward * tiles * learns,
      FORWARD_PRODUCTS * tiles * (learns and _attends_again(workload, remat, "language")),
    ),
    "head": Work(head, head * (learns + head_trains)),
  }


def _attends_again(workload: Workload, remat: str, part: str) -> bool:
  """Whether the backward pass computes attention's result again."""
  return remat != "none" and not (remat == "save_matmuls" and workload.saves_scores(part))


def _vision(model: ModelConfig, workload: Workload, train, remat: str) -> Work:
  vision, images = model.vision, workload.rows * workload.images
  tokens = images * (vision.patches + 1)
  layers = 2 * tokens * vision.layers * vision.width * (4 * vision.width + 2 * vision.mlp_width)
  down = 2 * tokens * vision.layers * vision.width * vision.mlp_width
  pairs = images * tile_pairs(vision.patches + 1, workload.tile, causal=False)
  tiles = 2 * pairs * vision.layers * vision.width
  patches = 2 * images * vision.patches * vision.patch_size**2 * 3 * vision.width
  again = (layers - down) * (remat == "full")
  again += FORWARD_PRODUCTS * tiles * _attends_again(workload, remat, "vision")
  return Work(
    layers + patches + FORWARD_PRODUCTS * tiles,
    (2 * layers + patches + BACKWARD_PRODUCTS * tiles) * train.vision,
    again * train.vision,
  )


def _projector(model: ModelConfig, workload: Workload, train) -> Work:
  projector = model.projector
  features = workload.rows * workload.images * model.tokens_per_image
  first = 2 * features * projector.in_width * projector.out_width
  second = 2 * features * projector.out_width**2 * (projector.kind == "mlp")
  weights = (first + second) * train.projector
  inputs = first * train.vision + second * (train.vision or train.projector)
  return Work(first + second, weights + inputs)


def language_layer(language) -> int:
  """Matrix elements of one decoder layer."""
  heads = (2 * language.heads + 2 * language.kv_heads) * language.head_dim
  return language.width * (heads + 3 * language.mlp_width)
