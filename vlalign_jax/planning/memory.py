"""Bytes of a step on one device, by formula: what training holds, saves, gathers and works with."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning.workload import Workload, tile_pairs
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    params, optimizer, gradients: what the shardings say, trained and frozen parameters alike.
    residuals: what the forward pass of a micro-batch saves for the backward pass.
    gathered: one layer's parameters, brought together where they are split.
    working: the largest of what comes and goes: the output head, or one layer's backward pass.
    host: bytes of the optimizer that are kept in host memory instead.
  """

  params: float
  optimizer: float
  gradients: float
  residuals: float
  gathered: float
  working: float
  host: float = 0.0

  @property
  def minimum(self) -> float:
    """What no order of operations can do without."""
    return self.params + self.optimizer + self.gradients + self.residuals + self.gathered

  @property
  def estimate(self) -> float:
    """What a program may be expected to take."""
    return self.minimum + self.working


def count(program, config, model: ModelConfig, mesh, workload: Workload) -> Memory:
  """Bytes of a step of a program.

  Args:
    program: `steps.program.Program`.
    config: of the run.
    model: the architecture.
    mesh: over which it runs.
    workload: of the step.
  """
  moments = _bytes(program.state.optimizer)
  host = _bytes(program.state.optimizer, on_host=True)
  language, vision = (
    program.params["language"]["layers"],
    program.params["vision"].get("layers", {}),
  )
  gathered = max(_gathered(stack, config, mesh) for stack in (language, vision))
  return Memory(
    params=_bytes(program.state.params) + _bytes(program.frozen),
    optimizer=moments,
    gradients=_gradients(program, config, mesh),
    residuals=residuals(config, model, workload, meshes.tensor_size(mesh)),
    gathered=gathered,
    working=_working(config, model, workload, meshes.tensor_size(mesh)),
    host=host,
  )


def _bytes(tree, on_host: bool = False) -> float:
  """Bytes that one device holds of a tree of shapes with shardings, in its own memory or not."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if (leaf.sharding.memory_kind in ("pinned_host", "unpinned_host")) == on_host
  )


def _gradients(program, config, mesh) -> float:
  """Sums over micro-batches are float32."""
  trained = program.state.params
  dtype = jnp.float32 if config.grad_accumulation > 1 else config.model.param_dtype
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), trained)
  split = zero.shardings(mesh, shapes, split=config.mesh.zero_stage >= 2)
  return _bytes(meshes.place(shapes, split))


def _gathered(stack, config, mesh) -> float:
  """One layer in the dtype it is used in, as `tensor` leaves it; nothing if it is never split."""
  if not stack or config.mesh.zero_stage < 3 or mesh.shape["fsdp"] == 1:
    return 0.0
  layers = next(iter(trees.flatten(stack).values())).shape[0]
  whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stack)) / layers
  return whole * jnp.dtype(config.model.dtype).itemsize / mesh.shape["tensor"]


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Widths of a transformer layer, as one device has them."""

  width: int
  heads: float
  head_dim: int
  kv_heads: float
  mlp_width: float
  gated: bool
  pairs: float  # that attention computes, per token
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
      return size * (3 * self.width + 2 * query + keys + mlp) + 4 * (6 * self.width + self.heads)
    saved = size * (2 * self.width + query + keys + (1 + self.gated) * self.mlp_width)
    if remat == "save_matmuls":  # tiles of scores and mixed values are products, too
      saved += 4 * (self.heads * self.pairs + query * self.parts)
    return saved


def _language_layer(model: ModelConfig, workload: Workload, tensor: int) -> _Layer:
  language = model.language
  tiles = math.ceil(workload.length / workload.tile)
  return _Layer(
    width=language.width,
    heads=language.heads / tensor,
    head_dim=language.head_dim,
    kv_heads=language.kv_heads / tensor,
    mlp_width=language.mlp_width / tensor,
    gated=True,
    pairs=tile_pairs(workload.length, workload.tile, causal=True) / workload.length,
    parts=(tiles + 1) / 2,
  )


def _vision_layer(model: ModelConfig, workload: Workload) -> _Layer:
  vision, tokens = model.vision, model.vision.patches + 1
  return _Layer(
    width=vision.width,
    heads=vision.heads,
    head_dim=vision.width // vision.heads,
    kv_heads=vision.heads,
    mlp_width=vision.mlp_width,
    gated=False,
    pairs=tile_pairs(tokens, workload.tile, causal=False) / tokens,
    parts=math.ceil(tokens / workload.tile),
  )


def residuals(config, model: ModelConfig, workload: Workload, tensor: int) -> float:
  """Bytes that all layers save for the backward pass of a micro-batch, on one device."""
  train, size = config.train, jnp.dtype(config.model.dtype).itemsize
  images = workload.device_rows * workload.images
  layer = _language_layer(model, workload, tensor)
  saved = layer.saved(config.model.remat, size) * model.language.layers
  total = saved * workload.device_rows * workload.length
  if train.vision:
    saved = _vision_layer(model, workload).saved(config.model.remat, size) * model.vision.layers
    total += saved * images * (model.vision.patches + 1)
  if train.projector:
    features = images * model.tokens_per_image
    total += size * features * (model.projector.in_width + 2 * model.projector.out_width)
  return total


def _working(config, model: ModelConfig, workload: Workload, tensor: int) -> float:
  """Bytes that come and go beside what is saved: the larger of head and layer."""
  language, size = model.language, jnp.dtype(config.model.dtype).itemsize
  tokens = workload.device_rows * workload.length
  kernel = language.width * language.vocab_size / tensor
  chunk = min(1024, tokens) * language.vocab_size / tensor
  head = kernel * (size + 4 * config.train.language) + chunk * (2 * 4 + size)
  head += 3 * tokens * language.width * size  # hidden states, in order, and their gradient

  layer = _language_layer(model, workload, tensor)
  backward = tokens * layer.saved("none", size)
  backward += 4 * tokens * (layer.heads + 2 * layer.kv_heads) * layer.head_dim  # of q, k and v
  parameters = language.width * (
    2 * (layer.heads + layer.kv_heads) * layer.head_dim + 3 * layer.mlp_width
  )
  backward += size * parameters * config.train.language  # gradients before they are split
  return max(head, backward)
