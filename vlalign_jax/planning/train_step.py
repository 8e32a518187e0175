"""The plan of a training step of SFT, reward models and DPO, built as training builds it."""

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp

from vlalign_jax import matmul_precision, trees
from vlalign_jax.errors import InputError
from vlalign_jax.hlo.loops import Trips
from vlalign_jax.models import tiles
from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.planning.step_plan import StepPlan, StepProgram, device_bytes
from vlalign_jax.planning.topology import Topology
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stage import Stage
from vlalign_jax.steps import model_flops, program
from vlalign_jax.weights import published, source

TOTAL_STEPS = 1000  # of the learning-rate schedule; its length changes nothing in a plan


def check(stage: Stage, config) -> None:
  """Checks a config as training does, but does not require data.

  Raises:
    InputError: names the first wrong key.
  """
  planned = copy.deepcopy(config)
  planned.data.train = planned.data.train or "unknown yet"
  stage.fill_paths(planned)
  stage.check(planned)


def model_config(config, head: str) -> ModelConfig:
  """Returns the architecture of the weights that a config names, or else a published one.

  Raises:
    InputError: the config names neither, or its adapters match no parameter.
  """
  if config.model.init_from or config.model.vision or config.model.language:
    return source.open_for(config, head).config
  if not config.model.architecture:
    raise InputError(
      "the config names no model: give config.model.init_from, or config.model.architecture="
      f"{' | '.join(published.MODELS)} to plan without weights"
    )
  model = published.published(config.model)
  model = dataclasses.replace(model, head=head)
  return source.with_adapters(model, config.lora)


def plan(
  stage: Stage,
  config,
  model: ModelConfig,
  topology: Topology,
  examples_per_row: int = 1,
  answers: int = 2,
) -> StepPlan:
  """Returns a plan for `step_plan.compile_plan` to compile.

  Args:
    stage: of the run.
    config: of the run.
    model: the architecture.
    topology: the devices.
    examples_per_row: how many examples packing puts into a row.
    answers: ranked answers of an example, if the stage learns from them.

  Raises:
    InputError: mesh, batch or model do not fit together.
  """
  mesh = meshes.make_mesh(config.mesh, topology.devices)
  matmul_precision.set_for(config.model.dtype, topology.kind)
  meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  batch, assumptions = abstract_batch(stage, config, model, mesh, examples_per_row, answers)
  step = stage.make_program(config, model, mesh, TOTAL_STEPS)
  num_rows, length = batch["tokens"].shape
  device_rows = num_rows // (meshes.row_blocks(mesh) * config.grad_accumulation)
  resident = {
    "trained parameters": device_bytes(step.state.params),
    "optimizer": device_bytes(step.state.optimizer),
    "frozen parameters": device_bytes(step.frozen),
    "reference": device_bytes(step.reference or {}),
    "batch": device_bytes(batch),
  }
  sizes = (model, num_rows, length, batch["images"].shape[1])
  flops = model_flops.count(step.params, step.state.params, *sizes)
  if step.reference is not None:
    flops += model_flops.count(step.params, {}, *sizes)
  return StepPlan(
    config=config,
    topology=topology,
    mesh=mesh,
    programs=(
      StepProgram(
        "training step",
        times=1,
        trips=trips(mesh, length, device_rows * length),
        lower=lambda: step.train_step.lower(step.state, step.frozen, batch, step.reference),
      ),
    ),
    resident={name: size for name, size in resident.items() if size},
    parameters=count_parameters(step.params, step.state.params),
    tokens=num_rows * length,
    model_flops=flops,
    summary=(
      f"stage {stage.name}: ZeRO {config.mesh.zero_stage}, remat {config.model.remat}, "
      f"{config.grad_accumulation} micro-batch{'es' * (config.grad_accumulation > 1)} of "
      f"{device_rows} row{'s' * (device_rows > 1)} a device",
    ),
    assumptions=assumptions,
  )


def count_parameters(params, trained) -> dict[str, dict[str, int]]:
  """Returns part of the model -> number of parameters ("all") and of trained ones ("trained")."""
  return {
    part: {"all": trees.size(tree), "trained": trees.size(trained.get(part, {}))}
    for part, tree in params.items()
  }


def trips(mesh, length: int, head_tokens: int, decoded: int = 0) -> Trips:
  """Returns how often loops run whose count depends on data.

  Args:
    mesh: the mesh that the program runs on.
    length: tokens of a row.
    head_tokens: the most positions of one device whose logits are computed.
    decoded: tokens that are generated one by one; 0: the program does not decode.
  """
  tile = tiles.CPU_TILE if mesh.devices.flat[0].platform == "cpu" else tiles.TILE
  # A tile of queries attends to the tiles of keys up to its own. On CPUs it starts at the example's
  # first tile: at the earliest at the row's.
  half = (math.ceil(length / tile) + 1) / 2
  head = math.ceil(head_tokens / meshes.head_chunk(mesh))
  return Trips(to_unknown=decoded or head, from_unknown=half, to_counter=half)


def abstract_batch(
  stage: Stage, config, model: ModelConfig, mesh, examples_per_row: int, answers: int
) -> tuple[dict, tuple[str, ...]]:
  """Returns the shapes of a batch of `config.batch_size` examples, and the assumptions behind them.

  Raises:
    InputError: the rows do not divide over the mesh, or the images do not fit into a row.
  """
  ranked = stage.task.answers == "ranked"
  if ranked and not 2 <= answers <= config.data.max_candidates:
    raise InputError(
      f"--answers={answers}: at least 2, and at most config.data.max_candidates="
      f"{config.data.max_candidates}"
    )
  if examples_per_row < 1 or (examples_per_row > 1 and not config.data.pack):
    raise InputError(
      f"--examples-per-row={examples_per_row}: at least 1, and more only with config.data.pack"
    )
  meshes.check_batch(config.batch_size, config.grad_accumulation, config.data.pack, mesh)
  shares = meshes.row_blocks(mesh) * config.grad_accumulation
  filled = -(-config.batch_size // examples_per_row)
  num_rows = -(-filled // shares) * shares
  length, images = config.data.max_length, config.data.max_images
  images = images or examples_per_row * model.most_tiles
  name = "tile" if model.most_tiles > 1 else "image"
  if images * model.tokens_per_image > length:
    raise InputError(
      f"{images} {name}s of {model.tokens_per_image} tokens do not fit into rows of "
      f"config.data.max_length={length}; raise it, or lower --examples-per-row"
    )
  assumptions = [
    f"{config.batch_size} examples, {examples_per_row} a row of {length} tokens with {images} "
    f"{name}{'s' * (images > 1)}: {num_rows} rows",
    "the head runs over all tokens (in training over those that are learned)",
  ]
  if num_rows > filled:
    assumptions.append(f"{num_rows - filled} of the rows are padding")
  batch = program.abstract_batch(model, mesh, num_rows, length, images)
  if ranked:
    assumptions.append(
      f"each example has {answers} ranked answers, within the row's length (--answers)"
    )
    ranks = (num_rows, examples_per_row, answers)
    shapes = {"answers": (ranks, jnp.int32), "examples": (ranks[:2], jnp.int32)}
    fields, sentences = stage.planned_fields(config, ranks)
    shapes |= fields
    assumptions += sentences
    for name, (shape, dtype) in shapes.items():
      sharding = meshes.batch_sharding(mesh)
      batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return batch, tuple(assumptions)
