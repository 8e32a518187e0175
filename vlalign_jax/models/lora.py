"""Low-rank adapters on linear maps (Hu et al. 2022, "LoRA").

Adapters are attached to a built model. `base_params` of a model with adapters are therefore the
parameters of the same model without.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from vlalign_jax import trees
from vlalign_jax.errors import InputError

NAMES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which linear maps have adapters, and how these are scaled; see the config's `lora` group.

  Attributes:
    rank: rank of adapters on the language model's layers and the projector; 0: no adapters.
    alpha: adapters are scaled by alpha / rank.
    dropout: share of an adapter's inputs to drop in training.
    use_rslora: whether to scale by alpha / sqrt(rank) instead (Kalajdzievski 2023).
    targets: regular expression searched for in the paths of linear maps, such as
      "language/layers/attention/query", "vision/layers/mlp/up" or "projector/first".
    vision_rank: rank of adapters on the vision tower's layers; 0: no adapters.
  """

  rank: int
  alpha: float = 16.0
  dropout: float = 0.0
  use_rslora: bool = False
  targets: str = "/layers/"
  vision_rank: int = 0

  def rank_of(self, path: str) -> int:
    """Returns the rank of the adapter on the linear map at `path`, 0 without adapter."""
    if not re.search(self.targets, path):
      return 0
    return self.vision_rank if path.startswith("vision/") else self.rank

  def scale(self, rank: int) -> float:
    """Returns the factor of an adapter's product."""
    return self.alpha / (rank**0.5 if self.use_rslora else rank)


def from_group(group) -> LoraConfig | None:
  """Makes a LoraConfig from a config's `lora` group; None if the group asks for no adapters."""
  if not group["rank"] and not group["vision_rank"]:
    return None
  return LoraConfig(**{field.name: group[field.name] for field in dataclasses.fields(LoraConfig)})


def is_adapter(path: str) -> bool:
  """Returns whether the parameter at `path` belongs to an adapter."""
  return path.endswith(tuple(f"/{name}" for name in NAMES))


def base_params(params):
  """Removes adapters from a nested dict of parameters."""
  return trees.split(params, is_adapter)[1]


def linear_maps(shapes) -> list[str]:
  """Returns paths of the linear maps that can have adapters, from the paths of parameters.

  These are the maps of stacked layers and of the projector. Not the heads, whose modules are never
  called, nor the patch embedding, which is a convolution in other frameworks.
  """
  kernels = [path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")]
  return [path for path in kernels if "/layers/" in path or path.startswith("projector/")]


def check_targets(config: LoraConfig, shapes) -> None:
  """Raises InputError, which lists the paths of linear maps, if `targets` matches none of them.

  Args:
    config: of the adapters.
    shapes: dict whose keys are the paths of the model's parameters.
  """
  for key, rank, in_vision in (
    ("rank", config.rank, False),
    ("vision_rank", config.vision_rank, True),
  ):
    paths = [path for path in linear_maps(shapes) if path.startswith("vision/") == in_vision]
    if rank and not any(config.rank_of(path) for path in paths):
      raise InputError(
        f"config.lora.{key} is {rank}, but config.lora.targets, {config.targets!r}, is found in "
        f"none of the paths that it applies to ({', '.join(paths) or 'there are none'}); change "
        f"the pattern, or set lora.{key} to 0"
      )


class AdaptedLinear(nnx.Module):
  """A linear map with an adapter: x W + b + scale * (dropout(x) A) B.

  `lora_a` [..., in, rank] is initialized Kaiming-uniform with a = sqrt(5), `lora_b` [..., rank,
  out] with zeros; those of stacked layers have a layer axis first. Both have the map's param_dtype
  and are used in its dtype.
  """

  def __init__(self, linear: nnx.Linear, rank: int, scale: float, dropout: float, rngs: nnx.Rngs):
    self.kernel, self.bias = linear.kernel, linear.bias
    self.dtype, self.scale, self.dropout = linear.dtype, scale, dropout
    self.dropout_key: Any = nnx.data(None)
    *stack, width, out = linear.kernel.shape
    dtype, bound = linear.param_dtype, width**-0.5
    uniform = jax.random.uniform(rngs.params(), (*stack, width, rank), dtype, -bound, bound)
    self.lora_a = nnx.Param(uniform)
    self.lora_b = nnx.Param(jnp.zeros((*stack, rank, out), dtype))

  def __call__(self, x):
    x, kernel, a, b = promote_dtype(
      (x, self.kernel[...], self.lora_a[...], self.lora_b[...]), dtype=self.dtype
    )
    y = x @ kernel
    if self.bias is not None:
      y += self.bias[...].astype(y.dtype)
    if self.dropout_key is not None:
      kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0)
    return y + (x @ a * self.scale) @ b


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def merge(kernel, a, b, scale: float, sharding: jax.sharding.Sharding):
  """Adds an adapter to its kernel: W + scale * A B, computed in float32.

  Args:
    kernel: float[..., in, out], donated; stacked layers have a layer axis first.
    a: float[..., in, rank].
    b: float[..., rank, out].
    scale: of the adapter.
    sharding: of the result.

  Returns:
    Like the kernel.
  """

  def add(kernel, a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

  if kernel.ndim == 2:
    return jax.lax.with_sharding_constraint(add(kernel, a, b), sharding)

  def add_to_layer(layer, kernel):  # one product in memory at a time
    return kernel.at[layer].set(add(kernel[layer], a[layer], b[layer]))

  merged = jax.lax.fori_loop(0, kernel.shape[0], add_to_layer, kernel)
  return jax.lax.with_sharding_constraint(merged, sharding)


def attach(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
  """Replaces a model's linear maps by adapted ones, in place; stacked maps by stacked ones."""
  modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  for path in linear_maps([f"{path}/kernel" for path in modules]):
    linear, rank = modules[path], config.rank_of(path)
    if rank and isinstance(linear, nnx.Linear):
      parent, name = path.rsplit("/", 1)
      adapted = AdaptedLinear(linear, rank, config.scale(rank), config.dropout, rngs)
      setattr(modules[parent], name, adapted)


def _with_dropout_rate(module: nnx.Module) -> list[AdaptedLinear]:
  parts = [part for _, part in nnx.iter_modules(module) if isinstance(part, AdaptedLinear)]
  return [part for part in parts if part.dropout]


def drops(module: nnx.Module) -> bool:
  """Returns whether adapters in the module have dropout."""
  return bool(_with_dropout_rate(module))


def with_dropout(module: nnx.Module, key: jax.Array | None) -> nnx.Module:
  """Returns the module with its adapters' dropout on, each with its own key; None: unchanged."""
  if key is None or not drops(module):
    return module
  module = nnx.clone(module)
  for number, adapter in enumerate(_with_dropout_rate(module)):
    adapter.dropout_key = jax.random.fold_in(key, number)
  return module
