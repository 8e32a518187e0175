"""A run of PPO, whose step is a rollout and the updates that learn from it."""

import functools

import numpy as np

from vlalign_jax.input_pipeline import prepare
from vlalign_jax.rollout import data, evaluation, learn, pretraining, roles, samples
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.stage import Stage
from vlalign_jax.steps import ppo_program
from vlalign_jax.training import loop, start
from vlalign_jax.writers import choose as writers


def train_and_evaluate(stage: Stage, c, workdir: str, profile: int = 0) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there.

  Args:
    stage: PPO.
    c: the config of the run.
    workdir: the run directory.
    profile: number of steps to trace.

  Raises:
    InputError: names the first thing that is wrong.
  """
  # --- What is asked for, checked before anything is computed ---
  mesh, actor = start.open_run(c, workdir, stage)
  sources = roles.open_sources(c, workdir, actor)
  by_function = bool(c.ppo.reward_function)
  records, eval_records = prepare.load_records(stage.task, c, keeps_columns=by_function)
  scorers = roles.find_scorers(c, sources, (*records.records, *eval_records))

  # --- Data: which prompt is in which row at which step is decided here, for the whole run ---
  multiple = meshes.row_blocks(mesh) * stage.rows_divide_into(c)
  train = data.prepare_train(c, actor, records, multiple, workdir)
  held_out = prepare.prepare_eval(stage.task, c, actor, eval_records, multiple, workdir)
  conversations = pretraining.prepare(c, actor, mesh, train.plan.steps)
  start.check_same_data(train, held_out, conversations)

  # --- The compiled functions and the shapes of what they take; nothing is allocated yet ---
  program = ppo_program.make_program(
    c,
    actor.config,
    sources.critic and sources.critic.config,
    sources.reward and sources.reward.config,
    data.make_sampling(c, actor),
    mesh,
    train.plan.steps,
  )
  ppo_program.check_updates(c, program, train.plan.steps)

  # --- The newest checkpoint, or the weights to start from ---
  make_state = functools.partial(roles.make_state, c, workdir, sources, program)
  manager, state, progress = start.restore_or_load(
    c, workdir, actor, program, train, stage.defaults(), make_state
  )
  if state is None:  # the run is finished
    return
  lengths = [one.plan.example_lengths for one in (train, held_out) if one is not None]
  models = roles.load(c, sources, program, mesh, scorers, state, np.concatenate(lengths))

  # --- The loop: a step is a rollout and the updates that learn from it ---
  first, steps = progress.get("step", 0), train.plan.steps
  with (
    train.batches(start_step=first, **start.my_share(mesh)) as batches,
    pretraining.opened(c, mesh, conversations, progress) as stream,
    writers.opened(c, workdir, first, resumes=first > 0) as opened,
  ):
    show = samples.make_show(workdir, c, actor.tokenizer, records.records, first, opened)
    functions = loop.LoopFunctions(
      train_step=learn.make_train_step(models, train, records.records, show, stream),
      to_device=functools.partial(hosts.to_device, mesh),
      count=hosts.make_counter(mesh),
      evaluate=evaluation.make_evaluate(models, held_out, eval_records),
      records=train.records,
      evaluates_first=True,
      lag=0,
    )
    loop.run(c, workdir, functions, state, progress, batches, manager, steps, opened, profile)
