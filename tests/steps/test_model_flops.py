"""The model's operations, 6 N T and attention, against those of compiled steps and programs."""

import pytest

from tests.planning import small
from vlalign_jax import stages
from vlalign_jax.planning import step_plan, topology
from vlalign_jax.weights import source


@pytest.fixture(scope="module")
def cpu():
  return topology.open_topology("cpu:1")


def compiled(cpu, stage="sft", layers=3, kind="mlp", width=64, **keys):
  config = small.config(stage, **({"model__remat": "none"} | keys))
  model = small.model(layers, kind, width=width, head=stages.STAGES[stage].head)
  model = source.with_adapters(model, config.lora)
  return step_plan.compile_plan(small.plan(config, model, cpu))


@pytest.mark.parametrize(
  ("stage", "keys"),
  [
    ("sft", {"train__vision": True, "grad_accumulation": 2}),
    ("sft", {"train__language": False}),
    ("sft", {"lora__rank": 8, "train__projector": False}),
    ("reward", {}),
    ("dpo", {"dpo__reference": "step"}),
  ],
)
def test_a_step_computes_what_its_model_needs(cpu, stage, keys):
  """Attention computes some more: full tiles, and again in the backward pass."""
  plan = compiled(cpu, stage, width=512, **keys)
  program = plan.programs[0].compiled
  assert program.kernels == 0
  assert not program.traffic
  # DPO computes the logits a second time in its backward pass.
  assert plan.model_flops == pytest.approx(program.flops, rel=0.1 if stage == "dpo" else 0.05)
  assert plan.model_flops < program.flops


def test_remat_computes_the_forward_pass_again(cpu):
  """Takes 8 N T in place of 6 N T for the layers, without the last product of each."""
  none, full = (compiled(cpu, model__remat=remat, width=512) for remat in ("none", "full"))
  assert none.model_flops == full.model_flops
  assert 1.15 < full.programs[0].compiled.flops / none.programs[0].compiled.flops < 4 / 3


def test_flops_and_bytes_grow_with_layers(cpu):
  """Counts a loop's body as often as it runs, in operations and in bytes."""
  few, more, most = (compiled(cpu, layers=layers).programs[0].compiled for layers in (3, 5, 7))
  # CPUs convert a bfloat16 stack of all layers to update one of them.
  for name, tolerance in {"flops": 0.02, "bytes_accessed": 0.2}.items():
    steps = getattr(more, name) - getattr(few, name), getattr(most, name) - getattr(more, name)
    assert steps[0] > 0.3 * getattr(few, name)
    assert steps[1] == pytest.approx(steps[0], rel=tolerance), name


def test_bytes_are_those_of_the_compiled_step(cpu):
  """The bytes that shapes add up to are the compiler's bytes of arguments."""
  plan = compiled(cpu)
  program = plan.programs[0].compiled
  assert program.arguments == pytest.approx(sum(plan.resident.values()), rel=0.01)
  assert program.total >= program.arguments + program.temporaries > program.arguments
  assert plan.total(plan.programs[0]) == pytest.approx(program.total, rel=0.01)
  moments = plan.resident["optimizer"] / plan.resident["trained parameters"]
  assert moments == pytest.approx(2, rel=0.01)
