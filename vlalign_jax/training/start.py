"""Begins a run of any stage: checks what is asked for, then loads or restores its state."""

import functools
from typing import Any

import jax
from absl import logging

from vlalign_jax import matmul_precision, out_of_memory, storage, trees
from vlalign_jax.config_checks import Config
from vlalign_jax.input_pipeline import examples
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.optim import optimizer
from vlalign_jax.runs import checkpoints, run_directory
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stage import Stage
from vlalign_jax.steps.program import TrainedModel
from vlalign_jax.weights import export, load, provenance, source
from vlalign_jax.writers import choose as writers


def open_run(
  config, workdir: str, stage: Stage, devices=None
) -> tuple[jax.sharding.Mesh, source.ModelSource]:
  """Checks what can be checked without data, and makes or opens the run directory.

  Args:
    config: of the run; paths in it become absolute.
    workdir: the run directory.
    stage: that the run is of.
    devices: to run on; None: all.

  Returns:
    The mesh, and the model that the run starts from.

  Raises:
    InputError: names the first thing that is wrong.
  """
  stage.check(config)
  writers.check(config.log)
  source.absolute_paths(config)
  mesh = meshes.make_mesh(config.mesh, devices)
  matmul_precision.set_for(config.model.dtype, mesh.devices.flat[0].platform)
  meshes.check_batch(config.batch_size, stage.rows_divide_into(config), config.data.pack, mesh)
  hosts.check_same("the config", f"{workdir} {config.to_json()}", "give all hosts the same command")
  resumes = run_directory.open_run(workdir, config, stage.defaults())
  opened = source.open_for(config, stage.head)
  if resumes:
    opened = provenance.check(opened, workdir)
  load.check_weights(opened)
  return mesh, opened


def check_same_data(*prepared: Prepared | None) -> None:
  """Raises an InputError unless all hosts have read the same records."""
  planned = " ".join(f"{one and one.identity}" for one in prepared)
  hosts.check_same("the records they read", planned, "give all hosts the same data files")


def my_share(mesh: jax.sharding.Mesh) -> dict:
  """Returns the arguments of `Prepared.batches` that give this process its rows."""
  share = hosts.row_share(mesh)
  options = {"blocks": share.blocks, "block_count": share.count}
  if jax.process_count() > 1:  # all hosts then end, or skip, at the same step
    options["on_bad_record"] = "skip"
  return options


@out_of_memory.names(out_of_memory.LOADING)
def restore_or_load(
  config,
  workdir: str,
  opened: source.ModelSource,
  program: Any,
  train: Prepared,
  defaults: Config,
  make_state=None,
) -> tuple[Any, Any, dict]:
  """Restores the newest checkpoint's state, or loads the first one.

  Args:
    config: of the run.
    workdir: the run directory.
    opened: from `open_run`.
    program: of the run, TrainProgram or PPOProgram.
    train: the training data.
    defaults: of the stage's config.
    make_state: () -> the first state; None: the program's, with the model's weights.

  Returns:
    (checkpoint manager, TrainState, progress); the state is None if the run is finished.

  Raises:
    InputError: the checkpoint is of another config or of other data.
  """
  manager = checkpoints.open_checkpoints(
    workdir, config.save_total_limit, config.save_best_limit, config.metric_for_best_model
  )
  restored = checkpoints.restore_newest(manager, program.state)
  if restored is None:
    if jax.process_index() == 0:
      with storage.written(f"{workdir}/model") as directory:
        export.save_model_files(opened, directory, config.model.param_dtype, config.data.template)
      storage.write(f"{workdir}/{examples.FILE}", examples.page(train))
    provenance.write(opened, workdir)
    if make_state is not None:
      state = make_state()
    else:
      state = program.init_state(load_trained(config, opened, program))
    return manager, state, {"bad_records": 0, "plan": train.identity}
  state, progress = restored
  run_directory.check_progress(progress, config, train.identity, workdir, defaults)
  steps = train.plan.steps
  logging.info("going on from step %d of %d", progress["step"], steps)
  if progress["step"] >= steps:
    logging.info("%s is finished: all %d steps are done", workdir, steps)
    state = None
  return manager, state, progress


@out_of_memory.names(out_of_memory.LOADING)
def load_trained(config, opened: source.ModelSource, program: TrainedModel) -> dict:
  """Loads the trained parameters with their values before training."""
  is_trained = functools.partial(optimizer.is_trained, config=config)
  return load.load_params(opened, program.params, config.seed, is_trained)


@out_of_memory.names(out_of_memory.LOADING)
def load_frozen(config, opened: source.ModelSource, program: TrainedModel) -> dict:
  """Loads the parameters that are not trained."""
  is_trained = functools.partial(optimizer.is_trained, config=config)
  frozen = load.load_params(opened, program.params, config.seed, lambda path: not is_trained(path))
  logging.info(
    "%.1f M parameters are trained, %.1f M are frozen; %d devices (%s)",
    trees.size(program.state.params) / 1e6,
    (trees.size(program.frozen) + trees.size(program.reference or {})) / 1e6,
    jax.device_count(),
    jax.devices()[0].device_kind,
  )
  return frozen


@out_of_memory.names(out_of_memory.LOADING)
def load_reference(config, opened: source.ModelSource, program: TrainedModel) -> dict | None:
  """Loads the initial values of what is trained; None for a stage without a reference.

  The tree is empty where only new adapters are trained.
  """
  if program.reference is None:
    return None
  initial = trees.flatten(program.reference)
  wanted = trees.unflatten(trees.flatten(program.params) | initial)
  return load.load_params(opened, wanted, config.seed, lambda path: path in initial)
