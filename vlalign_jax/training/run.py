"""A run of a stage whose step is one program: SFT, reward models, DPO."""

import functools

from vlalign_jax.input_pipeline import prepare
from vlalign_jax.optim import updates
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stage import Stage
from vlalign_jax.training import evaluation, loop, speed, start
from vlalign_jax.writers import choose as writers


def train_and_evaluate(stage: Stage, c, workdir: str, profile: int = 0) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there.

  Args:
    stage: of the run.
    c: its config.
    workdir: the run directory.
    profile: number of steps to trace.

  Raises:
    InputError: names the first thing that is wrong.
  """
  # --- What is asked for, checked before anything is computed ---
  mesh, source = start.open_run(c, workdir, stage)
  records, eval_records = prepare.load_records(stage.task, c)

  # --- Data: which record is in which row at which step is decided here, for the whole run ---
  blocks = meshes.row_blocks(mesh)
  multiple = blocks * c.grad_accumulation
  train = prepare.prepare_train(stage.task, c, source, records, multiple, workdir)
  held_out = prepare.prepare_eval(stage.task, c, source, eval_records, blocks, workdir)
  start.check_same_data(train, held_out)

  # --- The compiled functions and the shapes of what they take; nothing is allocated yet ---
  program = stage.make_program(c, source.config, mesh, train.plan.steps)
  updates.check(c, program.state.params, train.plan.steps)

  # --- What the stage adds to batches, computed before the run ---
  share, add_fields = start.my_share(mesh), {}
  if stage.prepare_batches is not None:
    data = {"train": train} | ({"eval": held_out} if held_out else {})
    add_fields = stage.prepare_batches(c, workdir, mesh, source, data, share)

  def to_device(name, batch):
    return hosts.to_device(mesh, add_fields[name](batch) if name in add_fields else batch)

  # --- The newest checkpoint, or the weights to start from ---
  manager, state, progress = start.restore_or_load(
    c, workdir, source, program, train, stage.defaults()
  )
  if state is None:  # the run is finished
    return
  frozen = start.load_frozen(c, source, program)
  reference = start.load_reference(c, source, program)

  def train_step(state, batch, carried):
    return *program.train_step(state, frozen, batch, reference), carried

  def eval_step(params, batch):
    return program.eval_step(params, frozen, batch, reference, **stage.eval_options(held_out))

  # --- The loop ---
  functions = loop.LoopFunctions(
    train_step=train_step,
    to_device=functools.partial(to_device, "train"),
    count=hosts.make_counter(mesh),
    evaluate=evaluation.make_evaluate(
      c, mesh, held_out, share, eval_step, stage.summary, functools.partial(to_device, "eval")
    ),
    records=train.records,
    speed=speed.measure(
      mesh, source.config, program.params, program.state.params, train.plan.row_images.mean()
    ),
  )
  first, steps = progress.get("step", 0), train.plan.steps
  with (
    train.batches(start_step=first, **share) as batches,
    writers.opened(c, workdir, first, resumes=first > 0) as opened,
  ):
    loop.run(c, workdir, functions, state, progress, batches, manager, steps, opened, profile)
