"""Formulas against what they stand for: real parameter trees, JAX's residuals, XLA's products."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.models import lora, tiles, vlm
from vlalign_jax.models.stack import REMAT_NAMES
from vlalign_jax.models.vlm import LANGUAGE
from vlalign_jax.optim import optimizer
from vlalign_jax.planning import learning, planner, report, residuals, topology
from vlalign_jax.weights import source

TRAIN = {
  "all": {"train__vision": True},
  "projector and language": {},
  "projector": {"train__language": False},
  "language": {"train__projector": False, "train__embeddings": False},
}


@pytest.fixture(scope="module")
def cpu():
  return topology.open_topology("cpu:1")


@pytest.mark.parametrize(
  ("train", "remat", "micro", "kind", "tied"),
  [
    ("all", "none", 1, "mlp", False),
    ("all", "save_weight_matmuls", 1, "linear", True),
    ("projector and language", "full", 4, "mlp", False),
    ("projector", "full", 2, "linear", False),
    ("projector", "save_matmuls", 1, "mlp", True),
    ("language", "save_matmuls", 2, "mlp", False),
  ],
)
def test_flops_are_those_of_the_compiled_step(cpu, train, remat, micro, kind, tied):
  """Every product of the step, loops over layers and micro-batches included."""
  config = small.config(model__remat=remat, grad_accumulation=micro, **TRAIN[train])
  plan = planner.compile_plan(planner.plan(config, small.model(kind=kind, tied=tied), cpu))
  assert plan.compiled.flops == pytest.approx(plan.device_flops, rel=0.02)
  assert plan.compiled.kernels == 0
  assert not plan.compiled.traffic


@pytest.mark.parametrize("kind", ["vit", "perceiver"])
@pytest.mark.parametrize("train", ["all", "projector", "language"])
def test_flops_of_other_projectors_are_those_of_the_compiled_step(cpu, kind, train):
  config = small.config(grad_accumulation=2, data__max_length=320, **TRAIN[train])
  model = small.model(kind=kind, width=128, mmca=True)
  plan = planner.compile_plan(planner.plan(config, model, cpu))
  assert plan.compiled.flops == pytest.approx(plan.device_flops, rel=0.02)


ADAPTED = {"lora__rank": 8, "train__projector": False}


@pytest.mark.parametrize(
  ("stage", "keys"),
  [
    ("sft", {"lora__rank": 8, "lora__targets": "query|up|projector", "model__remat": "none"}),
    ("reward", {"train__vision": True, "lora__vision_rank": 4, "lora__rank": 8}),
    ("reward", {"grad_accumulation": 2}),
    ("dpo", {"dpo__reference": "cache"}),
    ("dpo", {"dpo__reference": "step", "train__vision": True, "grad_accumulation": 2}),
    ("dpo", {"dpo__reference": "step", **ADAPTED}),
  ],
)
def test_flops_of_stages_and_adapters_are_those_of_the_compiled_step(cpu, stage, keys):
  config = small.config(stage, **keys)
  model = source.with_adapters(small.model(head=source.HEADS.get(stage, LANGUAGE)), config.lora)
  plan = planner.compile_plan(planner.plan(config, model, cpu, answers=3))
  assert plan.compiled.flops == pytest.approx(plan.device_flops, rel=0.02)
  in_step = stage == "dpo" and config.dpo.reference == "step"
  assert ("reference" in plan.operations) == in_step
  text = report.text(plan)
  assert ("each example has 3 ranked answers" in text) == (stage != "sft")
  assert ("the reference's copy is" in text) == in_step
  assert ("a forward pass each, before training" in text) == (stage == "dpo" and not in_step)
  assert max(map(len, text.splitlines())) <= 100


def test_flops_grow_with_layers_where_the_compilers_count_does_not(cpu):
  plans = [
    planner.compile_plan(planner.plan(small.config(), small.model(layers), cpu))
    for layers in (2, 4)
  ]
  shallow, deep = (plan.compiled for plan in plans)
  assert deep.flops / shallow.flops == pytest.approx(
    plans[1].device_flops / plans[0].device_flops, rel=0.01
  )
  assert deep.flops > 1.7 * shallow.flops
  assert deep.counted_once < 1.1 * shallow.counted_once


def test_arguments_are_those_of_the_compiled_step(cpu):
  plan = planner.compile_plan(planner.plan(small.config(), small.model(), cpu))
  held = plan.memory.params + plan.memory.optimizer
  rows = small.LENGTH * 7 * 4 + 16 * 16 * 3
  assert plan.compiled.arguments == pytest.approx(held + 8 * rows, rel=0.02)
  assert plan.compiled.total > plan.memory.minimum - plan.memory.gradients
  assert plan.total == plan.compiled.total


def _saved(function, *arguments) -> float:
  """Bytes of what `jax.vjp` saves, less what it is given."""
  shapes = jax.eval_shape(lambda *given: jax.vjp(function, *given)[1], *arguments)
  found = collections.Counter((x.shape, str(x.dtype)) for x in jax.tree.leaves(shapes))
  found.subtract((x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments))
  return sum(
    max(count, 0) * math.prod(shape) * jnp.dtype(dtype).itemsize
    for (shape, dtype), count in found.items()
  )


@pytest.mark.parametrize("remat", REMAT_NAMES)
@pytest.mark.parametrize("part", ["language", "adapted language", "vision"])
def test_residuals_of_a_layer_are_those_that_jax_saves(cpu, monkeypatch, part, remat):
  """The difference of two depths: what is saved once for all layers is not of a layer."""
  adapters = {"rank": 8, "targets": "/layers/"} if part.startswith("adapted") else {}
  part = part.split()[-1]
  monkeypatch.setattr(tiles, "CPU_TILE", 16)
  rows, length = 2, small.LENGTH

  def both(layers):
    config = small.config(model__remat=remat, train__vision=True, batch_size=rows)
    config.lora.update(adapters)
    model = small.model(layers, lora=lora.from_group(config.lora))
    plan = planner.plan(config, model, cpu)
    # Parameters of the dtype they are used in: a copy of each would be saved, too.
    types = dict.fromkeys(("dtype", "param_dtype"), "bfloat16")
    graphdef, params = vlm.abstract_params(model, **types, remat=remat, mesh=plan.mesh)
    layout = jnp.zeros((rows, length), jnp.int32)
    options = {"remat": remat, "mesh": plan.mesh}
    if part == "vision":
      x = jnp.zeros((rows, 16, 16, 3), jnp.float32)
      saved = _saved(lambda params: nnx.merge(graphdef, params).vision(x, **options), params)
    else:
      x = jax.ShapeDtypeStruct((rows, length, model.language.width), jnp.bfloat16)

      def call(params, frozen, x):
        model = nnx.merge(graphdef, trees.merge(params, jax.lax.stop_gradient(frozen)))
        return model.language(x, layout, layout, None, **options)

      is_trained = functools.partial(optimizer.is_trained, config=config)
      saved = _saved(call, *trees.split(params, is_trained), x)
    learns = learning.of(plan.program)
    layers_of = {
      "language": residuals.language_layer(model, learns, 1),
      "vision": residuals.vision_layer(model, plan.work, learns),
    }
    tokens = rows * (length if part == "language" else model.vision.patches + 1)
    count = model.language.layers if part == "language" else model.vision.layers
    return saved, layers_of[part].saved(remat, 2) * tokens * count

  shallow, deep = both(3), both(5)
  assert deep[1] - shallow[1] == pytest.approx(deep[0] - shallow[0], rel=0.02)
