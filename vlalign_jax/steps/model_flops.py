"""The operations that a training step's model needs, for MFU: 6 N T and attention.

The convention of PaLM (Chowdhery et al. 2022, appendix B): a weight costs 2 operations a token in
the forward pass and 4 in the backward pass; recomputation, norms and activation functions do not
count. Here the backward pass of a frozen weight costs 2, for the gradient of its input, and 0 if
nothing in or before it is trained.
"""

import math

from vlalign_jax import trees
from vlalign_jax.models.vlm import ModelConfig


def count(params, trained, model: ModelConfig, rows: int, length: int, images: int) -> float:
  """Counts the operations of a step over all devices.

  Ignores the window of sliding attention, and the perceiver's cross-attention.

  Args:
    params: shapes of all parameters.
    trained: shapes of those that are trained.
    model: the architecture.
    rows: of the step.
    length: tokens of a row; padding counts.
    images: of a row.
  """
  shapes, trained_paths = trees.flatten(params), set(trees.flatten(trained))
  vision, language = model.vision, model.language
  tokens = {
    "vision": rows * images * vision.patches,
    "projector": rows * images * model.tokens_per_image,
    "language": rows * length,
  }
  # Both products of attention; a causal mask leaves half of them.
  attention = {
    "vision": 4 * tokens["vision"] * vision.patches * vision.width * vision.layers,
    "projector": 0,
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
    backward = backward or any(path.startswith(f"{part}/") for path in trained_paths)
    # Forward and, for the inputs' gradients, backward; then the trained weights' gradients.
    total += (2 * count * sum(sizes.values()) + attention[part]) * (1 + backward)
    total += 2 * count * sum(size for path, size in sizes.items() if path in trained_paths)
    total += attention[part] * backward
  return total


def _is_product(path: str, tied: bool) -> bool:
  name = path.rpartition("/")[2]
  return name in ("kernel", "lora_a", "lora_b") or (tied and path.startswith("language/embedding/"))
