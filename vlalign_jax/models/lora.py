"""Low-rank adapters on linear maps (Hu et al. 2022, "LoRA").

A model is built first and adapters are attached to it, so that it is the same with and without:
`base_params` of a model with adapters are the parameters of the one that was built without.
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
  """Which linear maps have adapters, and what these add; the config's `lora` group says the same.

  Attributes:
    rank: of adapters on the language model's layers and the projector; 0: they have none.
    alpha: adapters count alpha / rank.
    dropout: share of an adapter's inputs that are dropped in training.
    use_rslora: adapters count alpha / sqrt(rank) instead (Kalajdzievski 2023).
    targets: regular expression that is searched in the paths of linear maps, such as
      "language/layers/attention/query", "vision/layers/mlp/up" or "projector/first".
    vision_rank: of adapters on the vision tower's layers; 0: they have none.
  """

  rank: int
  alpha: float = 16.0
  dropout: float = 0.0
  use_rslora: bool = False
  targets: str = "/layers/"
  vision_rank: int = 0

  def rank_of(self, path: str) -> int:
    """The rank of the adapter on a linear map, 0 if it has none; `path` as in `targets`."""
    if not re.search(self.targets, path):
      return 0
    return self.vision_rank if path.startswith("vision/") else self.rank

  def scale(self, rank: int) -> float:
    """What an adapter's product is multiplied by."""
    return self.alpha / (rank**0.5 if self.use_rslora else rank)


def from_group(group) -> LoraConfig | None:
  """From the `lora` group of a run's config; None: the run has no adapters."""
  if not group["rank"] and not group["vision_rank"]:
    return None
  return LoraConfig(**{field.name: group[field.name] for field in dataclasses.fields(LoraConfig)})


def is_adapter(path: str) -> bool:
  """Whether a parameter is an adapter's."""
  return path.endswith(tuple(f"/{name}" for name in NAMES))


def base_params(params):
  """Nested dict of parameters without the adapters'."""
  return trees.split(params, is_adapter)[1]


def linear_maps(shapes) -> list[str]:
  """Paths of the linear maps on which adapters may sit, of a model's parameters by path.

  These are the maps of stacked layers and the projector's: the heads are no modules that are
  called, and the patch embedding is a convolution elsewhere.
  """
  kernels = [path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")]
  return [path for path in kernels if "/layers/" in path or path.startswith("projector/")]


def check_targets(config: LoraConfig, shapes) -> None:
  """Refuses adapters that would sit nowhere.

  Args:
    config: of the adapters.
    shapes: whose keys are the paths of the model's parameters.

  Raises:
    InputError: with the paths that there are.
  """
  for key, rank, in_vision in (
    ("rank", config.rank, False),
    ("vision_rank", config.vision_rank, True),
  ):
    paths = [path for path in linear_maps(shapes) if path.startswith("vision/") == in_vision]
    if rank and not any(config.rank_of(path) for path in paths):
      raise InputError(
        f"config.lora.{key} is {rank}, and config.lora.targets, {config.targets!r}, is found in "
        f"none of the paths it is for ({', '.join(paths) or 'there are none'}); mend the pattern, "
        f"or set lora.{key} to 0"
      )


class AdaptedLinear(nnx.Module):
  """A linear map with an adapter beside it: x W + b + scale * (dropout(x) A) B.

  `lora_a` [..., in, rank] starts uniform as Kaiming's with a = sqrt(5), `lora_b` [..., rank, out]
  as zero; a stack's have its layers first. Both have the map's param_dtype and are used in its
  dtype.
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
  """The kernel with its adapter added: W + scale * A B, in float32.

  Args:
    kernel: float[..., in, out], given up; a stack's has its layers first.
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
  """Puts adapters on a model's linear maps, in place; stacked layers get stacked adapters."""
  modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  for path in linear_maps([f"{path}/kernel" for path in modules]):
    linear, rank = modules[path], config.rank_of(path)
    if rank and isinstance(linear, nnx.Linear):
      parent, name = path.rsplit("/", 1)
      adapted = AdaptedLinear(linear, rank, config.scale(rank), config.dropout, rngs)
      setattr(modules[parent], name, adapted)


def _dropping(module: nnx.Module) -> list[AdaptedLinear]:
  parts = [part for _, part in nnx.iter_modules(module) if isinstance(part, AdaptedLinear)]
  return [part for part in parts if part.dropout]


def drops(module: nnx.Module) -> bool:
  """Whether adapters in the module have dropout."""
  return bool(_dropping(module))


def with_dropout(module: nnx.Module, key: jax.Array | None) -> nnx.Module:
  """The module with the dropout of its adapters on, each with a key of its own; None: as it is."""
  if key is None or not drops(module):
    return module
  module = nnx.clone(module)
  for number, adapter in enumerate(_dropping(module)):
    adapter.dropout_key = jax.random.fold_in(key, number)
  return module
