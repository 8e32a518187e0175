"""Floating-point operations of a step, counted by formula: 2 for a multiplication with its sum."""

import dataclasses

from vlalign_jax.models import perceiver
from vlalign_jax.models.vlm import SCORE, ModelConfig
from vlalign_jax.planning import learning
from vlalign_jax.planning.learning import Learning, Map
from vlalign_jax.planning.workload import Workload, padded, tile_pairs

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
  backward: float = 0.0
  recomputed: float = 0.0

  @property
  def total(self) -> float:
    return self.forward + self.backward + self.recomputed

  def share(self, parts: int) -> "Work":
    """One of so many equal parts."""
    return Work(self.forward / parts, self.backward / parts, self.recomputed / parts)


def count(program, config, model: ModelConfig, workload: Workload) -> dict[str, Work]:
  """Operations by part.

  A part that nothing below learns from has no backward pass; one that stays itself but passes
  gradients on has half of it. Attention is counted in the tiles that are computed, over whole rows:
  packing more examples into a row saves nothing on accelerators. The head is counted over all
  tokens; it runs over the learnt ones only, so this is an upper bound.

  Args:
    program: `steps.program.Program`, which says what is trained.
    config: of the run.
    model: the architecture.
    workload: of the step.

  Returns:
    vision, projector, language, attention (the language model's tiles) and head; for DPO also
    reference, if it is computed in the step.
  """
  learns, remat = learning.of(program), config.model.remat
  parts = {
    "vision": _vision(model, workload, learns, remat),
    "projector": _projector(model, workload, learns),
    "language": _language(workload, learns, remat),
    "attention": _attention(model, workload, learns, remat),
    "head": _head(config, model, workload, learns),
  }
  if "reference" in program.frozen:
    # A forward pass of its own, with features of a frozen tower from the policy's.
    again = [name for name in parts if name != "vision" or learns.any("vision/")]
    forward = sum(parts[name].forward for name in again)
    if not config.lora.init_from:  # new adapters have no part in it
      forward -= _new_adapters(model, workload, learns)
    parts["reference"] = Work(forward)
  return parts


def _forward(found: Map) -> int:
  """Elements of the matrices that an input meets: x W and (x A) B."""
  return found.size + found.down + found.up


def _weights(found: Map) -> int:
  """Of the gradients of what is trained: as many products as elements."""
  return found.size * found.trained + found.down + found.up


def _inputs(found: Map, below: bool) -> int:
  """Of the gradient by the input; that by x A is there for A whether one is asked for or not."""
  return (found.size + found.down) * below + found.up


def _stack(maps: dict[str, Map], tokens: int, learns: bool, remat: str) -> Work:
  """Layers in a loop: if one learns, or something before them, gradients go through them all."""
  forward = sum(map(_forward, maps.values()))
  backward = sum(_weights(found) + _inputs(found, True) for found in maps.values())
  # The last product of a layer, which is not needed again; its adapter's x A is.
  last = sum(found.size + found.up for path, found in maps.items() if path.endswith("/mlp/down"))
  again = (forward - last) * (remat == "full")
  return Work(2 * tokens * forward, 2 * tokens * backward * learns, 2 * tokens * again * learns)


def _language(workload: Workload, learns: Learning, remat: str) -> Work:
  return _stack(learns.under("language/layers/"), workload.tokens, learns.language, remat)


def _attention(model: ModelConfig, workload: Workload, learns: Learning, remat: str) -> Work:
  language = model.language
  pairs = workload.rows * tile_pairs(workload.length, workload.tile, causal=True)
  tiles = 2 * pairs * language.layers * language.heads * language.head_dim
  forward, backward = FORWARD_PRODUCTS, BACKWARD_PRODUCTS
  if workload.has_kernel:
    backward = KERNEL_BACKWARD_PRODUCTS
    tiles *= 1 + model.mmca  # once over text, once over images
  else:
    forward += model.mmca  # values of text and of images are mixed apart
  return Work(
    forward * tiles,
    backward * tiles * learns.language,
    forward * tiles * (learns.language and remat != "none"),
  )


def _head(config, model: ModelConfig, workload: Workload, learns: Learning) -> Work:
  width = model.language.width
  if model.head == SCORE:  # of answers, not of tokens; it is always learnt
    score = 2 * workload.rows * workload.examples * workload.answers * width
    return Work(score, score * (learns.language + 1))
  logits = 2 * workload.tokens * width * model.language.vocab_size
  kernel = "embedding/" if model.language.tied_embeddings else "head/"
  backward = logits * (learns.language + learns.any(f"language/{kernel}"))
  # What these losses make of the log-probabilities is not known when they are first computed.
  return Work(logits, backward, logits * (config.stage in ("dpo", "ppo")))


def _vision(model: ModelConfig, workload: Workload, learns: Learning, remat: str) -> Work:
  vision, images = model.vision, workload.rows * workload.images
  trained = learns.any("vision/")
  layers = _stack(learns.under("vision/layers/"), images * (vision.patches + 1), trained, remat)
  pairs = images * tile_pairs(vision.patches + 1, workload.tile, causal=False)
  tiles = 2 * pairs * vision.layers * vision.width
  patches = 2 * images * vision.patches * vision.patch_size**2 * 3 * vision.width
  # Its tiles' products are saved by `save_matmuls`; those of loops that stop at the diagonal never.
  again = FORWARD_PRODUCTS * tiles * (remat in ("full", "save_weight_matmuls"))
  return Work(
    layers.forward + patches + FORWARD_PRODUCTS * tiles,
    layers.backward
    + patches * learns.any("vision/patch_embedding/")
    + BACKWARD_PRODUCTS * tiles * trained,
    layers.recomputed + again * trained,
  )


def _projector(model: ModelConfig, workload: Workload, learns: Learning) -> Work:
  images, kind = workload.rows * workload.images, model.projector.kind
  maps = learns.under("projector/")
  # In the order of the data; norms before its first map are trained as the vit projector is.
  order = sorted(maps, key=lambda path: path != "projector/input")
  below = learns.any("vision/") or (kind == "vit" and learns.any("projector/"))
  forward = backward = 0
  for path in order:
    found = maps[path]
    tokens = images * _projected(model, path)
    if path.endswith("/attention/query") and kind == "perceiver":  # the same for all images
      tokens = perceiver.QUERIES * workload.blocks * workload.accumulation
    forward += 2 * tokens * _forward(found)
    backward += 2 * tokens * (_weights(found) + _inputs(found, below))
    below = below or found.learns
  tiles = 2 * images * _projector_pairs(model, workload)
  learnt = learns.any("projector/", "vision/")
  return Work(forward + FORWARD_PRODUCTS * tiles, backward + BACKWARD_PRODUCTS * tiles * learnt)


def _projected(model: ModelConfig, path: str) -> int:
  """Places of an image that a map of the projector works on."""
  reads = ("/input", "/attention/key", "/attention/value")
  if model.projector.kind == "perceiver" and path.endswith(reads):
    return model.vision.patches
  return model.tokens_per_image


def _projector_pairs(model: ModelConfig, workload: Workload) -> float:
  """(query, key) pairs of an image in the projector's attention, times the width."""
  if model.projector.kind == "vit":
    pairs = tile_pairs(model.vision.tokens_per_image, workload.tile, causal=False)
    return pairs * model.vision.width
  if model.projector.kind == "perceiver":
    of_queries, of_keys = (
      padded(n, workload.tile) for n in (perceiver.QUERIES, model.vision.patches)
    )
    return of_queries * of_keys * model.projector.out_width
  return 0


def _new_adapters(model: ModelConfig, workload: Workload, learns: Learning) -> float:
  """Forward operations of the adapters that the reference of DPO is without."""
  images = workload.rows * workload.images
  tokens = {
    "vision/": images * (model.vision.patches + 1) * learns.any("vision/"),
    "language/": workload.tokens,
  }
  found = [(x, images * _projected(model, path)) for path, x in learns.under("projector/").items()]
  found += [(x, count) for part, count in tokens.items() for x in learns.under(part).values()]
  return sum(2 * count * (x.down + x.up) for x, count in found)
