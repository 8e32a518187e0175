"""The mesh that answers are sampled on: the devices of the run, arranged for decoding.

A decoder reads all of its weights for every token. Weights that are split over `tensor` stay where
they are read; those that are split over `fsdp` are brought together again for each token.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding

from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.generation import memory
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models.vlm import ModelConfig, abstract_params
from vlalign_jax.sharding import chips, roofline, rules
from vlalign_jax.sharding import mesh as meshes

AUTO, OWN = "auto", ""
# What a sampler reads of a model: pictures pass through the tower before.
READ = ("projector", "language")
# What a device of unknown speed is taken for; only the ratios decide.
_UNKNOWN = chips.Chip("unknown", math.inf, flops=1e12, bandwidth=5e10, interconnect=1e10)
# Seconds that a collective takes however little it sends: an assumption, for the choice alone.
_LATENCY = 1e-5


@dataclasses.dataclass(frozen=True)
class Demand:
  """What is sampled at a time: B prompts of up to S tokens, with N answers of up to M tokens each.

  Attributes:
    model: the architecture.
    sampling: has N and M.
    rows: B, over all devices.
    length: S.
    dtype: that the model computes in.
  """

  model: ModelConfig
  sampling: Sampling
  rows: int
  length: int
  dtype: str


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a layout takes: seconds of sampling, and bytes of a device besides what it holds."""

  seconds: float
  device_bytes: float


def sizes(value: str, key: str) -> dict[str, int] | None:
  """Returns the sizes in a value such as "tensor=4" or "data=2,tensor=4"; None for AUTO and OWN.

  An axis that is not named takes the devices that the other one leaves.

  Raises:
    InputError: names the key and what it may be.
  """
  if value in (AUTO, OWN):
    return None
  parts = [re.fullmatch(r"(data|tensor)=([1-9]\d*)", part.strip()) for part in value.split(",")]
  found = {part[1]: int(part[2]) for part in parts if part}
  if not all(parts) or len(found) < len(parts):
    raise InputError(
      f'config.{key} is {value!r}; give "auto", sizes such as "tensor=4" or "data=2,tensor=4", or '
      "nothing for the mesh of the run"
    )
  return found


def make_mesh(mesh: Mesh, wanted: dict[str, int], model: ModelConfig, key: str) -> Mesh:
  """Returns the devices of a run's mesh, in their order, as a mesh of these sizes.

  Args:
    mesh: of the run.
    wanted: from `sizes`.
    model: whose heads `tensor` must divide.
    key: of the config, for messages.

  Raises:
    InputError: the sizes do not suit the devices or the heads.
  """
  data, tensor = wanted.get("data", 0), wanted.get("tensor", 0)
  data, tensor = data or mesh.size // tensor, tensor or mesh.size // data
  fits = [split for _, split in layouts(mesh, model)]
  if data * tensor != mesh.size or tensor not in fits:
    raise InputError(
      f"config.{key} makes data={data} x tensor={tensor}; there are {mesh.size} devices, and "
      f"tensor must divide them, {model.language.heads} heads and {model.language.kv_heads} "
      f"key/value heads: choose it from {', '.join(map(str, fits))}"
    )
  return _arrange(mesh, data, tensor)


def _arrange(mesh: Mesh, data: int, tensor: int) -> Mesh:
  # In one program arrays may be placed over both meshes, as their devices come in one order.
  return Mesh(mesh.devices.reshape(data, 1, tensor), meshes.AXES, axis_types=mesh.axis_types)


def layouts(mesh: Mesh, model: ModelConfig) -> list[tuple[int, int]]:
  """Returns the (data, tensor) that a run's devices and the model's heads allow."""
  language = model.language
  common = math.gcd(mesh.size, language.heads, language.kv_heads)
  return [(mesh.size // n, n) for n in range(1, common + 1) if common % n == 0]


def choose(mesh: Mesh, params: dict, demand: Demand, held: float) -> Mesh | None:
  """Chooses the layout of the least estimated time among those that fit.

  Args:
    mesh: of the run.
    params: shapes of all parameters, with their shardings over it.
    demand: what is sampled.
    held: bytes that a device holds meanwhile.

  Returns:
    The mesh of the sampler; None: the weights stay where they are. If nothing fits, what takes
    the least.
  """
  chip = _chip(mesh)
  costs: dict[tuple[int, int] | None, Cost] = {None: _own_cost(mesh, params, demand, chip)}
  for data, tensor in layouts(mesh, demand.model):
    if demand.rows % data == 0:
      costs[data, tensor] = _cost(data, tensor, demand, chip)
  fitting = {key: cost for key, cost in costs.items() if held + cost.device_bytes <= chip.memory}
  best = min(fitting, key=lambda key: fitting[key].seconds) if fitting else None
  if not fitting:
    best = min(costs, key=lambda key: costs[key].device_bytes)
  for key, cost in costs.items():
    name = "the mesh of the run" if key is None else f"data={key[0]} x tensor={key[1]}"
    chosen, fits = " (chosen)" * (key == best), "" if key in fitting else ", does not fit"
    logging.info(
      "sampling on %s: about %.3g s for %d prompts, %.2f GB a device%s%s",
      *(name, cost.seconds, demand.rows, cost.device_bytes / 1e9, fits, chosen),
    )
  return None if best is None else _arrange(mesh, *best)


def _chip(mesh: Mesh) -> chips.Chip:
  """Returns what a device of the mesh can do; memory without limit where it is not known."""
  device = mesh.devices.flat[0]
  return chips.of_device(device.device_kind) or _UNKNOWN


def _cost(data: int, tensor: int, demand: Demand, chip: chips.Chip) -> Cost:
  """Returns the cost of weights that are split over `tensor` and copied over `data`."""
  language = abstract_params(demand.model)[1]["language"]
  copy = trees.size(language) * jnp.dtype(demand.dtype).itemsize / tensor
  return _sample(data, tensor, demand, chip, read=copy, gathered=0.0, copy=copy)


def _own_cost(mesh: Mesh, params: dict, demand: Demand, chip: chips.Chip) -> Cost:
  """Returns the cost of weights that stay split as they are."""
  tensor, whole, here = meshes.tensor_size(mesh), 0.0, 0.0
  for leaf in jax.tree.leaves(params["language"]):
    here += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    whole += leaf.size * leaf.dtype.itemsize / tensor
  return _sample(
    *(meshes.row_blocks(mesh), tensor, demand, chip), read=whole, gathered=whole - here, copy=0.0
  )


def _sample(
  data: int,
  tensor: int,
  demand: Demand,
  chip: chips.Chip,
  *,
  read: float,
  gathered: float,
  copy: float,
) -> Cost:
  """Returns the cost of reading prompts, then of decoding to the longest answer.

  Args:
    data, tensor: devices that split rows, and heads.
    demand, chip: see `choose`.
    read: bytes of weights that a device reads for a token.
    gathered: bytes of weights that it is sent for a token.
    copy: bytes of weights that it holds for the sampler alone.
  """
  language, sampling = demand.model.language, demand.sampling
  N, M, itemsize = (
    sampling.num_return_sequences,
    sampling.max_new_tokens,
    jnp.dtype(demand.dtype).itemsize,
  )
  rows = demand.rows / data
  sums = 2 * language.layers * 2 * (tensor - 1) / tensor * language.width * itemsize
  parameters = trees.size(abstract_params(demand.model)[1]["language"]) / tensor
  groups = ((demand.rows, demand.length),)
  kept = memory.cache_bytes(demand.model, sampling, groups, demand.dtype) / (data * tensor)
  collectives = (2 * language.layers + 2) * (tensor > 1) + 7 * language.layers * (gathered > 0)

  def seconds(tokens: float, accessed: float) -> float:
    sent = gathered + sums * tokens
    time = roofline.estimate(chip, 2 * parameters * tokens, accessed, sent)
    return (time.total if time else 0.0) + collectives * _LATENCY

  total = seconds(rows * demand.length, read) + (M - 1) * seconds(rows * N, read + kept)
  # Activations of the prompts, and a few arrays as large as the logits.
  split = 2 * language.mlp_width + 4 * language.heads * language.head_dim
  activations = rows * demand.length * (6 * language.width + split / tensor) * itemsize
  return Cost(total, copy + kept + activations + 4 * rows * N * language.vocab_size * 4)


def shapes_on(mesh: Mesh, params: dict, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns path -> shape, with its sharding, of what a sampler reads: all but the vision tower.

  Matrices are in the dtype that they are used in, split over `tensor` alone.

  Args:
    mesh: of the sampler.
    params: shapes of all parameters.
    dtype: that the model computes in.
  """
  found = {}
  for path, leaf in trees.flatten({name: params[name] for name in READ}).items():
    matrix = path.endswith(("/kernel", "/embedding", "/lora_a", "/lora_b"))
    sharding = NamedSharding(mesh, rules.spec(path, leaf.shape, mesh, split=False))
    found[path] = jax.ShapeDtypeStruct(
      leaf.shape, jnp.dtype(dtype) if matrix else leaf.dtype, sharding=sharding
    )
  return found


def placement(mesh: Mesh, params: dict, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns those of `shapes_on` that are not yet in their place and dtype.

  Args:
    mesh, dtype: see `shapes_on`.
    params: shapes of all parameters, with their shardings.
  """
  flat = trees.flatten(params)

  def in_place(path: str, wanted: jax.ShapeDtypeStruct) -> bool:
    leaf = flat[path]
    same = wanted.sharding.is_equivalent_to(leaf.sharding, len(leaf.shape))
    return same and leaf.dtype == wanted.dtype

  wanted = shapes_on(mesh, params, dtype)
  return {path: leaf for path, leaf in wanted.items() if not in_place(path, leaf)}


def named(array: jax.Array, sharding: NamedSharding) -> jax.Array:
  """Returns an array as one over another mesh of the same devices; every shard stays as it is.

  Programs with kernels for GPUs take arrays of one mesh only.
  """
  shards = [shard.data for shard in array.addressable_shards]
  return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def make_move(wanted: dict[str, jax.ShapeDtypeStruct]):
  """Returns the compiled program that brings {path: parameter} to the places of `placement`."""

  def move(leaves):
    return {path: leaf.astype(wanted[path].dtype) for path, leaf in leaves.items()}

  return jax.jit(move, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})
