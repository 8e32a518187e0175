"""A stage's compiled functions together with the shapes and placements of all that they take.

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
class TrainedModel:
  """A model of which a part is trained; shapes are trees of jax.ShapeDtypeStruct with shardings.

  Attributes:
    graphdef: of the whole model.
    params: shapes of all parameters, trained ones in model.param_dtype, frozen ones in model.dtype.
    state: shapes of the TrainState.
    frozen: shapes of the parameters that are not trained.
    reference: shapes of the initial values of what is trained, which together with `frozen` make
      the reference; None where the stage has none in its step.
    init_state: trained parameters (given up) -> TrainState.
    placement: TrainState of the shardings of its leaves.
    update: the arguments of `update.train_step` that depend on the model: optimizer, learning_rate
      and constrain_gradients.
  """

  graphdef: Any
  params: dict
  state: training_state.TrainState
  frozen: dict
  reference: dict | None
  init_state: Callable
  placement: training_state.TrainState
  update: dict


@dataclasses.dataclass(frozen=True)
class TrainProgram(TrainedModel):
  """A trained model with the compiled functions of its run; `init_state` is compiled, too.

  Attributes:
    train_step: `(state, frozen, batch, reference=None) -> (state, metrics)`; gives up the state.
    eval_step: `(trained parameters, frozen, batch, reference=None) -> values`, see `losses.sums`; a
      stage may have further, static arguments.
  """

  train_step: Callable
  eval_step: Callable


def make_program(
  config,
  model: ModelConfig,
  mesh: jax.sharding.Mesh,
  total_steps: int,
  *,
  make_loss: Callable,
  denominators: Callable,
  metrics: Callable,
  eval_step: Callable,
  with_reference: bool = False,
  static: tuple[str, ...] = (),
) -> TrainProgram:
  """Returns the program of a run.

  Args:
    config: of the run.
    model: the architecture.
    mesh: over which it runs.
    total_steps: updates of the whole run.
    make_loss, denominators, metrics: of the stage, see `update.train_step`; make_loss is also given
      `graphdef`, `mesh` and `chunk`.
    eval_step: `(trained parameters, StepInputs, batch, graphdef, mesh, chunk)`, of the stage.
    with_reference: whether steps are given the initial values of the trained parameters.
    static: arguments of eval_step that are not arrays.
  """
  trained = make_trained_model(config, model, mesh, total_steps, with_reference)
  placement = trained.placement
  common = {"graphdef": trained.graphdef, "mesh": mesh, "chunk": meshes.head_chunk(mesh)}
  train_step = functools.partial(
    update.train_step,
    make_loss=functools.partial(make_loss, **common),
    denominators=denominators,
    metrics=metrics,
    seed=config.seed,
    mesh=mesh,
    accumulation=config.grad_accumulation,
    **trained.update,
  )

  def evaluate(params, frozen, batch, reference=None, **options):
    return eval_step(params, update.StepInputs(frozen, reference), batch, **common, **options)

  if config.mesh.offload_optimizer:
    train_step = _fetching(train_step, placement.optimizer)
    placement = placement._replace(
      optimizer=zero.offload(mesh, meshes.place(trained.state.optimizer, placement.optimizer))
    )
  init_state = jax.jit(trained.init_state, out_shardings=placement, donate_argnums=0)
  own: Any = {"state": meshes.place(trained.state, placement), "placement": placement}
  return TrainProgram(
    **(dict[str, Any](vars(trained)) | own | {"init_state": init_state}),
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(placement, meshes.replicated(mesh))
    ),
    eval_step=jax.jit(evaluate, static_argnames=static, out_shardings=meshes.replicated(mesh)),
  )


def make_trained_model(
  config,
  model: ModelConfig,
  mesh: jax.sharding.Mesh,
  total_steps: int,
  with_reference: bool = False,
) -> TrainedModel:
  """Returns what is trained of a model and where all of it goes; see `make_program`."""
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
  # Frozen parameters are kept in the dtype that they are used in.
  abstract = trees.map_paths(
    lambda path, leaf: leaf if is_trained(path) else leaf.update(dtype=config.model.dtype), abstract
  )
  params = meshes.place(abstract, zero.shardings(mesh, abstract, split=stage >= 3))
  trained, frozen = trees.split(params, is_trained)
  tx = optimizer.make_optimizer(config.optim, trained, total_steps, config.model.dtype)
  init_state = functools.partial(training_state.init_state, optimizer=tx)
  state = jax.eval_shape(init_state, trained)
  placement = zero.state_shardings(mesh, state, stage)
  return TrainedModel(
    graphdef=graphdef,
    params=params,
    state=meshes.place(state, placement),
    frozen=frozen,
    reference=_initial(trained, config) if with_reference else None,
    init_state=init_state,
    placement=placement,
    update={
      "optimizer": tx,
      "learning_rate": optimizer.learning_rates(config.optim, total_steps)["base"],
      "constrain_gradients": lambda tree: zero.constrain_gradients(mesh, tree, stage),
    },
  )


def reference_model(config, model: ModelConfig) -> ModelConfig:
  """Returns the architecture of a policy's reference, which has no new adapters."""
  return model if config.lora.init_from else dataclasses.replace(model, lora=None)


def reference_graphdef(config, model: ModelConfig, mesh: jax.sharding.Mesh):
  """Returns the graphdef of the reference, which `reference` and `frozen` are the parameters of."""
  options = {name: config.model[name] for name in ("dtype", "remat", "attention")} | {"mesh": mesh}
  return abstract_params(reference_model(config, model), **options)[0]


def _initial(trained, config) -> dict:
  """Returns the shapes of the initial values; new adapters change nothing at the start."""
  kept, _ = trees.split(trained, lambda path: config.lora.init_from or not lora.is_adapter(path))
  return jax.tree.map(lambda leaf: leaf.update(dtype=config.model.dtype), kept)


def _fetching(train_step, placement):
  """Returns the step with the optimizer's state brought from the hosts to the devices."""

  def step(state, *arguments):
    state = state._replace(optimizer=jax.device_put(state.optimizer, placement))
    return train_step(state, *arguments)

  return step


def abstract_batch(
  model: ModelConfig, mesh: jax.sharding.Mesh, num_rows: int, length: int, images: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch as `data.pipeline` makes it, see ARCHITECTURE.md, "Rows"."""
  names = ("tokens", "positions", "segments", "branches", "targets", "image_slots")
  size = model.vision.image_size
  shapes = {
    **dict.fromkeys(names, ((num_rows, length), jnp.int32)),
    "loss_mask": ((num_rows, length), jnp.float32),
    "images": ((num_rows, images, size, size, 3), jnp.uint8),
  }
  sharding = meshes.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, (shape, dtype) in shapes.items()
  }
