"""Supervised fine-tuning. See configs/sft.py for presets and ARCHITECTURE.md for how it works.

python scripts/train_sft.py --config=configs/sft.py:PRESET --workdir=DIR [--config.KEY=VALUE ...]
"""

import functools

import jax
from absl import flags, logging
from ml_collections import config_flags

from vlalign_jax import cli, config, storage, trees
from vlalign_jax.data import sft as data
from vlalign_jax.sharding import hosts
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.steps import sft as steps
from vlalign_jax.training import checkpoints, loop, metrics, optimizer, run_directory
from vlalign_jax.weights import export, load, pin, source


def train_and_evaluate(c, workdir: str) -> None:
  """Trains by a config into a run directory, or goes on with the run that is there."""
  # --- What is asked for, checked before anything is computed ---
  config.check(c, "sft")
  source.absolute_paths(c.model)
  mesh = meshes.make_mesh(c.mesh)
  meshes.check_batch(c.batch_size, c.grad_accumulation, c.data.pack, mesh)
  hosts.check_same("the config", f"{workdir} {c.to_json()}", "give all hosts the same command")
  resumes = run_directory.open_run(workdir, c)
  model_source = source.open_source(c.model, c.data.image_aspect)
  if resumes:
    model_source = pin.check(model_source, workdir)
  load.check_weights(model_source)
  records, eval_records = data.load_records_of(c)

  # --- Data: which record is in which row at which step is decided here, for the whole run ---
  shards = meshes.row_blocks(mesh)
  train = data.prepare_train(c, model_source, records, shards * c.grad_accumulation)
  evaluation = data.prepare_eval(c, model_source, eval_records, shards)
  total_steps = train.plan.steps
  share = hosts.row_share(mesh)
  mine = {"blocks": share.blocks, "block_count": share.count}
  if jax.process_count() > 1:  # what one host cannot read is every host's to end at, or to skip
    mine["on_bad_record"] = "skip"
  planned = f"{train.identity} {evaluation and evaluation.identity}"
  hosts.check_same("the records they read", planned, "give all hosts the same data files")

  # --- The compiled functions and the shapes of what they take; nothing is allocated yet ---
  program = steps.make_program(c, model_source.config, mesh, total_steps)

  # --- The newest checkpoint, or the weights to start from ---
  manager = checkpoints.open_checkpoints(workdir, c.keep, c.keep_best, c.best_metric)
  restored = checkpoints.restore_newest(manager, program.state)
  is_trained = functools.partial(optimizer.is_trained, config=c)
  load_params = functools.partial(load.load_params, model_source, program.params, c.seed)
  if restored is None:
    if jax.process_index() == 0:
      with storage.written(f"{workdir}/model") as directory:
        export.save_model_files(model_source, directory, c.model.param_dtype, c.data.template)
    pin.write(model_source, workdir)
    state = program.init_state(load_params(wanted=is_trained))
    progress = {"bad_records": 0, "plan": train.identity}
  else:
    state, progress = restored
    run_directory.check_progress(progress, c, train.identity, workdir)
    logging.info("going on from step %d of %d", progress["step"], total_steps)
    if progress["step"] >= total_steps:
      logging.info("%s is finished: all %d steps are done", workdir, total_steps)
      return
  frozen = load_params(wanted=lambda path: not is_trained(path))
  logging.info(
    "%.1f M parameters are trained, %.1f M are frozen; %d devices (%s)",
    trees.size(state.params) / 1e6,
    trees.size(frozen) / 1e6,
    mesh.size,
    jax.devices()[0].device_kind,
  )

  to_device, count = functools.partial(hosts.to_device, mesh), hosts.make_counter(mesh)

  def check_evaluation(counts) -> int:
    bad = sum(int(found["bad_records"]) for found in jax.device_get(counts))
    loop.check_bad_records("data.eval", bad, evaluation.records, c.data.on_bad_record)
    return bad

  if evaluation:  # now: the first evaluation may be days away
    read = map(to_device, evaluation.read(**mine))
    check_evaluation([count(rows, rows["skipped"]) for rows in read])

  def evaluate(state):
    counts, sums = [], []
    # Threads: a pool of processes takes longer to start than most evaluations take.
    with evaluation.batches(workers=0, **mine) as batches:
      for rows in map(to_device, batches):
        counts.append(count(rows, rows.pop("skipped")))
        sums.append(
          program.eval_step(state.params, frozen, rows, max_segments=evaluation.max_segments)
        )
    bad = check_evaluation(counts)
    return metrics.evaluation(sums) | {"bad_records": bad}

  # --- The loop ---
  with train.batches(start_step=progress.get("step", 0), **mine) as batches:
    if "data" in progress:
      batches.set_state(progress["data"])
    loop.run(
      c,
      workdir,
      loop.Stage(
        train_step=lambda state, rows: program.train_step(state, frozen, rows),
        to_device=to_device,
        count=count,
        evaluate=evaluate if evaluation else None,
        records=train.records,
      ),
      state,
      progress,
      batches,
      manager,
      total_steps,
    )


def main(_):
  train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_string("workdir", "", "The run directory.")
  cli.run(main, several_hosts=True)
