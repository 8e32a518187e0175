"""Supervised fine-tuning. See configs/sft.py for presets and ARCHITECTURE.md for how it works.

python scripts/train_sft.py --config=configs/sft.py:PRESET --workdir=DIR [--config.KEY=VALUE ...]
"""

import functools

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli
from vlalign_jax.input_pipeline import sft as data
from vlalign_jax.losses import sft as losses
from vlalign_jax.optim import updates
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import sft as steps
from vlalign_jax.training import evaluation, loop, start


def train_and_evaluate(c, workdir: str) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there."""
  # --- What is asked for, checked before anything is computed ---
  mesh, source = start.open_run(c, workdir, "sft")
  records, eval_records = data.load_records(c)

  # --- Data: which record is in which row at which step is decided here, for the whole run ---
  blocks = meshes.row_blocks(mesh)
  train = data.prepare_train(c, source, records, blocks * c.grad_accumulation)
  held_out = data.prepare_eval(c, source, eval_records, blocks)
  start.check_same_data(train, held_out)

  # --- The compiled functions and the shapes of what they take; nothing is allocated yet ---
  program = steps.make_program(c, source.config, mesh, train.plan.steps)
  updates.check(c, program.state.params, train.plan.steps)

  # --- The newest checkpoint, or the weights to start from ---
  manager, state, progress = start.restore_or_load(c, workdir, source, program, train)
  if state is None:  # the run is finished
    return
  frozen = start.load_frozen(c, source, program)

  def eval_step(params, rows):
    return program.eval_step(params, frozen, rows, max_segments=held_out.max_segments)

  # --- The loop ---
  share = start.my_share(mesh)
  stage = loop.Stage(
    train_step=lambda state, rows: program.train_step(state, frozen, rows),
    to_device=functools.partial(hosts.to_device, mesh),
    count=hosts.make_counter(mesh),
    evaluate=evaluation.make_evaluate(c, mesh, held_out, share, eval_step, losses.summary),
    records=train.records,
  )
  with train.batches(start_step=progress.get("step", 0), **share) as batches:
    loop.run(c, workdir, stage, state, progress, batches, manager, train.plan.steps)


def main(_):
  train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_string("workdir", "", "The run directory.")
  cli.run(main, several_hosts=True)
