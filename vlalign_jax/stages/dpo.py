"""Direct preference optimization: the policy learns which of several answers is preferred.

The reference's log-probabilities are either in the batch (`reference` float32[B, S, K], computed
once before training) or computed in the step from the initial values of the trained parameters.
With adapters these are the same weights with the adapters off: there is no second model.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlalign_jax import trees
from vlalign_jax.config_checks import Config, check_choices
from vlalign_jax.input_pipeline.preferences import TASK
from vlalign_jax.losses import dpo, sums
from vlalign_jax.stage import Stage
from vlalign_jax.steps import answers, program, update
from vlalign_jax.training import reference

IN_STEP, CACHED = "step", "cache"


def add_keys(c: Config) -> None:
  """Adds the keys of DPO to a config."""
  c.metric_for_best_model = "eval/rewards/accuracies"
  c.dpo = ConfigDict()
  c.dpo.loss = "sigmoid"  # sigmoid, hinge, ipo or robust, see losses/dpo.py
  c.dpo.beta = 0.1  # strength of the pull towards the reference
  c.dpo.label_smoothing = 0.0  # share of rankings assumed to be wrong (sigmoid: cDPO; robust)
  # Weight of the best answers' cross-entropy per token, added to the loss (not to eval/loss).
  c.dpo.sft_weight = 0.0
  # When the reference's log-probabilities are computed: step (in every step, from a copy of the
  # initial trained parameters; no copy with adapters) or cache (once before training).
  c.dpo.reference = "step"


def check_keys(config: Config) -> None:
  """Raises an InputError for values that no run can have."""
  settings = config.dpo
  check_choices(config, {"dpo.loss": dpo.KINDS, "dpo.reference": (IN_STEP, CACHED)})
  dpo.check_settings(settings.loss, settings.beta, settings.label_smoothing, settings.sft_weight)


def _log_probabilities(graphdef, reference_graphdef, params, inputs, batch, number=None, **options):
  """Returns the (policy's, reference's) log-probabilities of answers, float32[B, S, K] each.

  `number` is that of the micro-batch, in training.
  """

  def of_policy(batch):
    policy = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    random = {} if number is None else update.dropout(policy, inputs.key, number)
    return answers.log_probabilities(policy, batch | random, **options)

  if inputs.reference is None:
    return of_policy(batch), batch["reference"]
  if "vision" not in params and batch["images"].shape[1]:  # both look through the same tower
    policy = nnx.merge(graphdef, trees.merge(params, inputs.frozen))
    batch = batch | {"vision_features": policy.vision_features(batch["images"])}
  model = nnx.merge(reference_graphdef, trees.merge(inputs.reference, inputs.frozen))
  initial = jax.lax.stop_gradient(answers.log_probabilities(model, batch, **options))
  # One after the other. Side by side, the two would hold the activations of both, and on CPUs
  # their collectives could wait for each other's threads forever.
  params, batch, initial = jax.lax.optimization_barrier((params, batch, initial))
  return of_policy(batch), initial


def _loss_arguments(log_probabilities, batch):
  """Returns the arrays [B * S, K] that losses.dpo takes."""
  arrays = (*log_probabilities, answers.lengths(batch), answers.valid(batch))
  return tuple(map(answers.flat, arrays))


def loss_denominators(batch):
  """Returns what the loss is divided by, and the mean length of the best answers of the step."""
  examples = answers.examples(batch)
  ranked = jnp.sum(answers.valid(batch), axis=-1) > 1
  chosen = jnp.sum(answers.lengths(batch)[:, :, 0] * ranked)
  return {"loss": examples, "chosen_length": chosen / jnp.maximum(examples, 1.0)}


def make_loss(
  inputs: update.StepInputs,
  *,
  graphdef,
  reference_graphdef,
  settings,
  mesh: Mesh | None = None,
  chunk: int = 128,
):
  """Returns the loss of a micro-batch, see `update.train_step`; its sum is over examples.

  Args:
    inputs: of the step; `reference` is None where the batch has its log-probabilities.
    graphdef, reference_graphdef: of the policy, and of the reference.
    settings: the config's `dpo` group.
    mesh: over which the batch is split.
    chunk: see `losses.head.cross_entropy_sum`.
  """
  compute = functools.partial(
    _log_probabilities, graphdef, reference_graphdef, mesh=mesh, chunk=chunk
  )

  def loss(params, batch, number):
    arrays = _loss_arguments(compute(params, inputs, batch, number), batch)
    length = inputs.denominators["chosen_length"]
    total, _ = dpo.loss(*arrays, chosen_length=length, **_options(settings))
    return total, dpo.metrics(*arrays, beta=settings.beta)

  return loss


def _options(settings) -> dict:
  return {
    "kind": settings.loss,
    "beta": settings.beta,
    "label_smoothing": settings.label_smoothing,
    "sft_weight": settings.sft_weight,
  }


def metrics(reported, denominators):
  """Returns what is logged in addition to what all stages log."""
  return sums.quotients(reported) | {"examples": denominators["loss"]}


def eval_step(
  params, inputs, batch, *, graphdef, reference_graphdef, settings, mesh=None, chunk: int = 128
):
  """Returns the sums over a batch, see `losses.sums`; the SFT term is apart, as nll_loss."""
  found = _log_probabilities(
    graphdef, reference_graphdef, params, inputs, batch, mesh=mesh, chunk=chunk
  )
  arrays = _loss_arguments(found, batch)
  loss = dpo.loss(*arrays, **_options(settings) | {"sft_weight": 0.0})
  return {"loss": loss, "examples": answers.examples(batch)} | dpo.metrics(
    *arrays, beta=settings.beta
  )


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.TrainProgram:
  """Returns the program of a run; arguments as of `program.make_program`."""
  options = {
    "reference_graphdef": program.reference_graphdef(config, model, mesh),
    "settings": config.dpo,
  }
  return program.make_program(
    config,
    model,
    mesh,
    total_steps,
    make_loss=functools.partial(make_loss, **options),
    denominators=loss_denominators,
    metrics=metrics,
    eval_step=functools.partial(eval_step, **options),
    with_reference=config.dpo.reference == IN_STEP,
  )


def prepare_batches(config, workdir: str, mesh: Mesh, source, data: dict, share: dict) -> dict:
  """Computes the reference's log-probabilities, or reads them, where `dpo.reference` is "cache".

  Args:
    config, workdir, mesh, source: of the run.
    data: name -> Prepared.
    share: of `start.my_share`.

  Returns:
    Name -> function that adds the reference's log-probabilities to a host batch.
  """
  if config.dpo.reference != CACHED:
    return {}
  tables = reference.log_probabilities(config, workdir, mesh, source, data, share)
  return {name: functools.partial(reference.add_to_batch, table) for name, table in tables.items()}


def planned_fields(config, sizes: tuple[int, int, int]):
  """Returns the fields of a batch that hold what was computed before training, see `Stage`."""
  if config.dpo.reference != CACHED:
    return {}, ()
  sentence = "the reference's log-probabilities are cached: one forward pass each, before training"
  return {"reference": (sizes, jnp.float32)}, (sentence,)


STAGE = Stage(
  name="dpo",
  task=TASK,
  metrics=(
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/logps/accuracies",
  ),
  add_keys=add_keys,
  check_keys=check_keys,
  make_program=make_program,
  prepare_batches=prepare_batches,
  planned_fields=planned_fields,
)
