"""One optimizer update of direct preference optimisation, and the sums of its evaluation.

The reference's log-probabilities are either among the rows (`reference` float32[B, S, K], computed
once before training) or computed in the step, by the values that the trained parameters had at
first. With adapters these are the same weights with the adapters off: there is no second model.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vlalign_jax import trees
from vlalign_jax.losses import dpo, sums
from vlalign_jax.models.vlm import abstract_params
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.steps import accumulate, answers, program, update

IN_STEP, CACHED = "step", "cache"


def _log_probabilities(graphdef, reference_graphdef, params, frozen, rows, random, **options):
  """(policy's, reference's) log-probabilities of the answers, float32[B, S, K] each.

  `random`: model -> what its rows hold besides in training.
  """
  reference = frozen.get("reference")
  frozen = {part: tree for part, tree in frozen.items() if part != "reference"}
  policy = nnx.merge(graphdef, trees.merge(params, frozen))
  if reference is None:
    found = answers.log_probabilities(policy, rows | random(policy), **options)
    return found, rows["reference"]
  if "vision" not in params and rows["images"].shape[1]:  # both look through the same tower
    rows = rows | {"vision_features": policy.vision_features(rows["images"])}
  model = nnx.merge(reference_graphdef, trees.merge(reference, frozen))
  initial = jax.lax.stop_gradient(answers.log_probabilities(model, rows, **options))
  # One after the other: side by side, the two hold the activations of both, and on CPUs each
  # other's threads in collectives that never complete.
  params, rows, initial = jax.lax.optimization_barrier((params, rows, initial))
  policy = nnx.merge(graphdef, trees.merge(params, frozen))
  return answers.log_probabilities(policy, rows | random(policy), **options), initial


def _loss_arguments(found, rows):
  """Arrays [B * S, K] that losses.dpo takes."""
  arrays = (*found, answers.lengths(rows), answers.valid(rows))
  return tuple(map(answers.flat, arrays))


def count(rows):
  """What the loss of a step is divided by, and the mean length of the best answers in it."""
  examples = answers.examples(rows)
  ranked = jnp.sum(answers.valid(rows), axis=-1) > 1
  chosen = jnp.sum(answers.lengths(rows)[:, :, 0] * ranked)
  return {"loss": examples, "chosen_length": chosen / jnp.maximum(examples, 1.0)}


def make_loss(
  frozen,
  counts,
  key,
  *,
  graphdef,
  reference_graphdef,
  settings,
  mesh: Mesh | None = None,
  chunk: int = 128,
):
  """See `update.train_step`; the sum is of the losses of examples.

  Args:
    graphdef, reference_graphdef: of the policy, and of the reference where it is in `frozen`.
    settings: the config's `dpo` group.
  """

  def loss(params, rows, number):
    found = _log_probabilities(
      graphdef,
      reference_graphdef,
      params,
      frozen,
      rows,
      lambda model: update.dropout(model, key, number),
      mesh=mesh,
      chunk=chunk,
    )
    arrays = _loss_arguments(found, rows)
    total, _ = dpo.loss(*arrays, chosen_length=counts["chosen_length"], **_options(settings))
    return total, dpo.metrics(*arrays, beta=settings.beta)

  return loss


def _options(settings) -> dict:
  return {
    "kind": settings.loss,
    "beta": settings.beta,
    "label_smoothing": settings.label_smoothing,
    "sft_weight": settings.sft_weight,
  }


def metrics(found, counts):
  """What is logged besides what all stages log."""
  return sums.quotients(found) | {"examples": counts["loss"]}


def eval_step(
  params, frozen, rows, *, graphdef, reference_graphdef, settings, mesh=None, chunk: int = 128
):
  """Sums over a batch, see `losses.sums`; the loss is without its SFT term, which is nll_loss."""
  found = _log_probabilities(
    graphdef,
    reference_graphdef,
    params,
    frozen,
    rows,
    lambda model: {},
    mesh=mesh,
    chunk=chunk,
  )
  arrays = _loss_arguments(found, rows)
  loss = dpo.loss(*arrays, **_options(settings) | {"sft_weight": 0.0})
  examples = answers.examples(rows)
  return {"loss": loss, "examples": examples} | dpo.metrics(*arrays, beta=settings.beta)


def make_program(config, model, mesh: Mesh, total_steps: int) -> program.TrainProgram:
  """See `program.make_program`; with `dpo.reference=cache` rows bring the reference's numbers."""
  options = {
    "reference_graphdef": program.reference_graphdef(config, model, mesh),
    "settings": config.dpo,
  }
  return program.make_program(
    config,
    model,
    mesh,
    total_steps,
    functools.partial(make_loss, **options),
    count,
    metrics,
    functools.partial(eval_step, **options),
    keep_initial=config.dpo.reference == IN_STEP,
  )


@dataclasses.dataclass(frozen=True)
class Reference:
  """What computes the reference's log-probabilities before training.

  Attributes:
    params: shapes of its parameters, all in model.dtype, with shardings.
    log_probabilities: `(params, rows) -> (int32[B, S] examples, float32[B, S, K])`, on every host.
  """

  params: dict
  log_probabilities: object


def make_reference(config, model, mesh: Mesh) -> Reference:
  """The reference of a run; arguments as in `make_program`."""
  dtype = config.model.dtype
  graphdef, shapes = abstract_params(
    program.reference_model(config, model),
    dtype=dtype,
    param_dtype=dtype,
    attention=config.model.attention,
    mesh=mesh,
  )
  split = config.mesh.zero_stage >= 3
  params = meshes.place(shapes, zero.shardings(mesh, shapes, split=split))
  chunking = {"mesh": mesh, "chunk": meshes.head_chunk(mesh)}

  def micro_batch(params, rows):
    rows = jax.tree.map(lambda x: meshes.constrain_rows(x, mesh), rows)
    return answers.log_probabilities(nnx.merge(graphdef, params), rows, **chunking)

  def log_probabilities(params, rows):
    # As training does; held-out rows may not divide into as many parts.
    of_device = rows["tokens"].shape[0] // meshes.row_blocks(mesh)
    parts = accumulate.split_rows(rows, math.gcd(config.grad_accumulation, of_device))
    found = jax.lax.map(functools.partial(micro_batch, params), parts)
    return rows["examples"], accumulate.join_rows(found)

  place = meshes.replicated(mesh)  # a few numbers an answer
  return Reference(params, jax.jit(log_probabilities, out_shardings=place))
