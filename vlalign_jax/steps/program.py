"""A stage's compiled functions together with the shapes and places of all that they take.

Training runs a program; planning compiles the same one without ever allocating its arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlalign_jax import trees
from vlalign_jax.models import lora
from vlalign_jax.models.vlm import ModelConfig, abstract_params
from vlalign_jax.optim import optimizer
from vlalign_jax.optim import state as training_state
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.steps import update


@dataclasses.dataclass(frozen=True)
class TrainProgram:
  """Nothing here is allocated; shapes are trees of jax.ShapeDtypeStruct with shardings.

  Attributes:
    graphdef: of the whole model.
    params: shapes of all parameters, trained ones in model.param_dtype, frozen ones in model.dtype.
    state: shapes of the TrainState.
    frozen: shapes of the parameters that stay; with `keep_initial` also, below "reference", those
      of the initial values of what is trained.
    init_state: trained parameters (given up) -> TrainState.
    train_step: `(state, frozen, rows) -> (state, metrics)`; the state is given up.
    eval_step: `(trained parameters, frozen, rows) -> values`, see `losses.sums`; a stage may have
      further arguments.
  """

  graphdef: Any
  params: dict
  state: training_state.TrainState
  frozen: dict
  init_state: Callable
  train_step: Callable
  eval_step: Callable


def make_program(
  config,
  model: ModelConfig,
  mesh: jax.sharding.Mesh,
  total_steps: int,
  make_loss,
  count,
  metrics,
  eval_step,
  keep_initial: bool = False,
  static: tuple[str, ...] = (),
) -> TrainProgram:
  """The program of a run.

  Args:
    config: of the run.
    model: the architecture.
    mesh: over which it runs.
    total_steps: updates of the whole run.
    make_loss, count, metrics, eval_step: of the stage, with the arguments of those in `steps.sft`.
    keep_initial: whether steps are given what the trained parameters were at first.
    static: arguments of eval_step that are no arrays.
  """
  learner = make_learner(config, model, mesh, total_steps, keep_initial)
  placement = learner.placement
  common = {"graphdef": learner.graphdef, "mesh": mesh, "chunk": meshes.head_chunk(mesh)}
  train_step = functools.partial(
    update.train_step,
    make_loss=functools.partial(make_loss, **common),
    count=count,
    metrics=metrics,
    seed=config.seed,
    mesh=mesh,
    accumulation=config.grad_accumulation,
    **learner.update,
  )
  if config.mesh.offload_optimizer:
    train_step = _fetching(train_step, placement.optimizer)
    placement = placement._replace(
      optimizer=zero.offload(mesh, meshes.place(learner.state.optimizer, placement.optimizer))
    )
  return TrainProgram(
    graphdef=learner.graphdef,
    params=learner.params,
    state=meshes.place(learner.state, placement),
    frozen=learner.frozen,
    init_state=jax.jit(learner.init_state, out_shardings=placement, donate_argnums=0),
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(placement, meshes.replicated(mesh))
    ),
    eval_step=jax.jit(
      functools.partial(eval_step, **common),
      static_argnames=static,
      out_shardings=meshes.replicated(mesh),
    ),
  )


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A model of which a part is trained; nothing here is allocated.

  Attributes:
    graphdef, params, state, frozen: as of TrainProgram.
    init_state: trained parameters -> TrainState.
    placement: TrainState of the shardings of its leaves.
    update: the arguments of `update.train_step` that depend on the model: optimizer, learning_rate
      and constrain_gradients.
  """

  graphdef: Any
  params: dict
  state: training_state.TrainState
  frozen: dict
  init_state: Callable
  placement: training_state.TrainState
  update: dict


def make_learner(
  config,
  model: ModelConfig,
  mesh: jax.sharding.Mesh,
  total_steps: int,
  keep_initial: bool = False,
) -> TrainedModel:
  """What is trained of a model, where all of it goes, and how it moves; see `make_program`."""
  meshes.check_heads(mesh, model.language.heads, model.language.kv_heads)
  stage = config.mesh.zero_stage
  graphdef, abstract = abstract_params(
    model,
    dtype=config.model.dtype,
    param_dtype=config.model.param_dtype,
    remat=config.model.remat,
    attention=config.model.attention,
    mesh=mesh,
  )
  is_trained = functools.partial(optimizer.is_trained, config=config)
  # What stays is kept in the dtype it is used in.
  abstract = trees.map_paths(
    lambda path, leaf: leaf if is_trained(path) else leaf.update(dtype=config.model.dtype), abstract
  )
  params = meshes.place(abstract, zero.shardings(mesh, abstract, split=stage >= 3))
  trained, frozen = trees.split(params, is_trained)
  tx = optimizer.make_optimizer(config.optim, trained, total_steps, config.model.dtype)
  init_state = functools.partial(training_state.init_state, optimizer=tx)
  state = jax.eval_shape(init_state, trained)
  placement = zero.state_shardings(mesh, state, stage)
  if keep_initial:
    frozen = frozen | {"reference": _initial(trained, config)}
  return TrainedModel(
    graphdef=graphdef,
    params=params,
    state=meshes.place(state, placement),
    frozen=frozen,
    init_state=init_state,
    placement=placement,
    update={
      "optimizer": tx,
      "learning_rate": optimizer.learning_rates(config.optim, total_steps)["base"],
      "constrain_gradients": lambda tree: zero.constrain_gradients(mesh, tree, stage),
    },
  )


def reference_model(config, model: ModelConfig) -> ModelConfig:
  """The architecture of a policy's reference; new adapters change nothing, so it has none."""
  return model if config.lora.init_from else dataclasses.replace(model, lora=None)


def reference_graphdef(config, model: ModelConfig, mesh: jax.sharding.Mesh):
  """The graphdef that goes with a reference and the parameters that stay."""
  options = {name: config.model[name] for name in ("dtype", "remat", "attention")} | {"mesh": mesh}
  return abstract_params(reference_model(config, model), **options)[0]


def _initial(trained, config) -> dict:
  """Shapes of what was there before training; new adapters change nothing at first."""
  kept, _ = trees.split(trained, lambda path: config.lora.init_from or not lora.is_adapter(path))
  return jax.tree.map(lambda leaf: leaf.update(dtype=config.model.dtype), kept)


def _fetching(train_step, placement):
  """The step with the optimizer's state brought from the hosts to where it is used."""

  def step(state, frozen, rows):
    state = state._replace(optimizer=jax.device_put(state.optimizer, placement))
    return train_step(state, frozen, rows)

  return step


def abstract_rows(
  model: ModelConfig, mesh: jax.sharding.Mesh, rows: int, length: int, images: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch as `data.pipeline` makes it, see ARCHITECTURE.md, "Rows"."""
  names = ("tokens", "positions", "segments", "branches", "targets", "image_slots")
  size = model.vision.image_size
  shapes = {
    **dict.fromkeys(names, ((rows, length), jnp.int32)),
    "loss_mask": ((rows, length), jnp.float32),
    "images": ((rows, images, size, size, 3), jnp.uint8),
  }
  sharding = meshes.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, (shape, dtype) in shapes.items()
  }
