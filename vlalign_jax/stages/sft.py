"""Supervised fine-tuning: the cross-entropy of the answers of conversations."""

import functools

from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.input_pipeline.sft import TASK
from vlalign_jax.losses import sft
from vlalign_jax.stage import Stage
from vlalign_jax.steps import program
from vlalign_jax.steps import sft as steps


def metrics(sums, denominators):
  """Returns what is logged in addition to what all stages log."""
  del sums
  return {"learned_tokens": denominators["loss"]}


def eval_step(params, inputs, batch, *, graphdef, max_segments: int, chunk: int, mesh: Mesh):
  """Returns the sums over a batch, see `losses.sft.evaluation`."""
  model = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
  return sft.evaluation(
    model(batch | steps.ONE_ANSWER),
    model.head_kernel(),
    batch,
    max_segments=max_segments,
    **steps.chunking(mesh, chunk),
  )


make_program = functools.partial(
  program.make_program,
  make_loss=steps.make_loss,
  denominators=steps.loss_denominators,
  metrics=metrics,
  eval_step=eval_step,
  static=("max_segments",),
)

STAGE = Stage(
  name="sft",
  task=TASK,
  metrics=("eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/exact_match"),
  add_keys=lambda config: None,
  check_keys=lambda config: None,
  make_program=make_program,
  summary=sft.summary,
  eval_options=lambda held_out: {"max_segments": held_out.max_segments},
)
