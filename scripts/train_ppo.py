"""Proximal policy optimisation. See configs/ppo.py for presets, ARCHITECTURE.md for how it works.

python scripts/train_ppo.py --config=configs/ppo.py:PRESET --workdir=DIR [--config.KEY=VALUE ...]
"""

import functools

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.rollout import data, evaluation, learn, pretraining, roles, samples
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import ppo_program
from vlalign_jax.training import loop, start


def train_and_evaluate(c, workdir: str) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there."""
  # --- What is asked for, checked before anything is computed ---
  mesh, actor = start.open_run(c, workdir, "ppo")
  sources = roles.open_sources(c, workdir, actor)
  records, eval_records = data.load_records(c)
  score = roles.find_scorers(c, sources, (*records.records, *eval_records))

  # --- Data: which prompt is in which row at which step is decided here, for the whole run ---
  rows = meshes.row_blocks(mesh) * c.grad_accumulation * c.ppo.num_mini_batches
  train = data.prepare_train(c, actor, records, rows)
  held_out = data.prepare_eval(c, actor, eval_records, rows)
  mixed = pretraining.prepare(c, actor, mesh, train.plan.steps)
  start.check_same_data(train, held_out, mixed)

  # --- The compiled functions and the shapes of what they take; nothing is allocated yet ---
  program = ppo_program.make_program(
    c,
    actor.config,
    sources.critic and sources.critic.config,
    sources.reward and sources.reward.config,
    data.make_sampling(c, actor),
    mesh,
    train.plan.steps,
    actor.tokenizer.pad_token_id,
  )
  ppo_program.check_updates(c, program, train.plan.steps)

  # --- The newest checkpoint, or the weights to start from ---
  manager, state, progress = start.restore_or_load(
    c,
    workdir,
    actor,
    program,
    train,
    functools.partial(roles.make_state, c, workdir, sources, program),
  )
  if state is None:  # the run is finished
    return
  held = roles.load(c, sources, program, mesh, score)

  # --- The loop: a step is a rollout and the updates that learn from it ---
  show = samples.make_show(workdir, c, actor.tokenizer, records.records, int(state.step))
  first, share = progress.get("step", 0), start.my_share(mesh)
  with (
    train.batches(start_step=first, **share) as batches,
    pretraining.opened(c, mesh, mixed, progress) as conversations,
  ):
    stage = loop.Stage(
      train_step=learn.make_train_step(held, train, records.records, progress, show, conversations),
      to_device=functools.partial(hosts.to_device, mesh),
      count=hosts.make_counter(mesh),
      evaluate=evaluation.make_evaluate(held, held_out, eval_records),
      records=train.records,
      evaluates_first=True,
      lag=0,
    )
    loop.run(c, workdir, stage, state, progress, batches, manager, train.plan.steps)


def main(_):
  train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/ppo.py:llava15_7b.")
  flags.DEFINE_string("workdir", "", "The run directory.")
  cli.run(main, several_hosts=True)
