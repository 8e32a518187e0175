"""The operations that a training step's model needs, for MFU: 6 N T and attention.

The convention of PaLM (Chowdhery et al. 2022, appendix B): a weight costs 2 operations a token in
the forward pass and 4 in the backward pass; nothing that is computed again counts, nor do norms or
activation functions. Here the backward pass of what stays costs 2, and 0 where nothing before or
in it is trained.
"""

import math

from vlalign_jax import trees
from vlalign_jax.models.vlm import ModelConfig


def count(params, trained, model: ModelConfig, rows: int, length: int, images: int) -> float:
  """Counts the operations of a step over all devices.

  Args:
    params: shapes of all parameters.
    trained: shapes of those that are trained.
    model: the architecture. A window of attention, and the perceiver's cross-attention, are not
      taken into account.
    rows: of the step.
    length: tokens of a row; padding counts.
    images: of a row.
  """
  shapes, learned = trees.flatten(params), set(trees.flatten(trained))
  tokens = {
    "vision": rows * images * model.vision.patches,
    "projector": rows * images * model.tokens_per_image,
    "language": rows * length,
  }
  vision, language = model.vision, model.language
  # Both products of attention, of which a causal mask leaves half.
  attention = {
    "vision": 4 * tokens["vision"] * vision.patches * vision.width * vision.layers,
    "language": 2 * tokens["language"] * length * language.heads * language.head_dim,
  }
  attention["language"] *= language.layers
  total, backward = 0.0, False
  for part, count in tokens.items():
    sizes = {
      path: math.prod(leaf.shape)
      for path, leaf in shapes.items()
      if path.startswith(f"{part}/") and _is_product(path, language.tied_embeddings)
    }
    of_part = {path for path in learned if path.startswith(f"{part}/")}
    backward = backward or bool(of_part)
    forward = 2 * count * sum(sizes.values()) + attention.get(part, 0)
    total += forward * (1 + backward)
    total += 2 * count * sum(size for path, size in sizes.items() if path in learned)
    total += attention.get(part, 0) * backward
  return total


def _is_product(path: str, tied: bool) -> bool:
  name = path.rpartition("/")[2]
  return name in ("kernel", "lora_a", "lora_b") or (tied and path.startswith("language/embedding/"))
