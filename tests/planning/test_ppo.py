"""The plan of PPO: its formulas against compiled programs, and what its models share."""

import dataclasses
import json

import pytest

from configs import ppo as presets
from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora
from vlalign_jax.planning import planner, ppo, ppo_models, ppo_report, topology
from vlalign_jax.planning.chips import GIB

ADAPTED = {"lora__rank": 8, "train__projector": False}
SAMPLES = {"ppo__num_samples": 3, "ppo__estimator": "grpo", "ppo__sample_parts": 2}


MIXED = {"ppo__sft_weight": 1.0, "ppo__sft_data": "chats.json"}


@pytest.fixture
def tiny(monkeypatch):
  """Where a published size is asked for, a tiny model is planned."""
  monkeypatch.setattr(planner.architectures, "published", lambda group: small.model())


def config(**keys):
  settings = {"model__architecture": "small", "ppo__max_new_tokens": 24}
  return small.config("ppo", data__pack=False, **(settings | keys))


@pytest.mark.parametrize(
  "keys",
  [
    # Two rows have about as many tokens of answers as the head takes at a time.
    {"train__vision": True, "grad_accumulation": 2, "ppo__max_new_tokens": 63, **MIXED},
    {"ppo__reward_function": "rules:score", "ppo__critic_init": "actor", **ADAPTED},
    SAMPLES,
  ],
)
def test_flops_are_those_of_the_compiled_programs(tiny, keys):
  """Every product of every program; the decoder's loop as often as its longest answer has it."""
  planner.check(config(**keys))
  plan = ppo.compile_plan(ppo.plan(config(**keys), topology.open_topology("cpu:1")))
  names = [phase.name for phase in plan.phases]
  assert ("pictures" in names) == ("train__vision" not in keys)
  assert ("values" in names) == ("ppo__estimator" not in keys)
  assert ("reward model" in names) == ("ppo__reward_function" not in keys)
  for phase in plan.phases:
    assert phase.compiled.flops == pytest.approx(phase.operations, rel=0.02), phase.name
  text = ppo_report.text(plan)
  assert max(map(len, text.splitlines())) <= 100
  assert ("no reward model is given" in text) == ("reward model" in names)
  assert "fits: the chip has" in text
  numbers = json.loads(json.dumps(ppo_report.as_json(plan)))
  assert numbers["total_device_bytes"] == plan.total(plan.largest)


def test_a_tpu_slice(tiny):
  """The compiler for TPUs, asked about sampling."""
  c = config(mesh__data=1, mesh__fsdp=-1, mesh__zero_stage=3)
  plan = ppo.plan(c, topology.open_topology("v5e:2x2"))
  sampling = next(phase for phase in plan.phases if phase.name == "sampling")
  plan = ppo.compile_plan(dataclasses.replace(plan, phases=(sampling,)))
  sampling = plan.phases[0]
  assert plan.fits
  assert plan.cache < sampling.compiled.temporaries
  assert sampling.compiled.traffic["all-gather"].bytes > 0
  assert plan.seconds == sampling.time.step > 0
  assert "sampling" in ppo_report.text(plan)


def held(preset: str, where: str, **settings):
  """(plan, parameters of the actor that are no adapters, adapters of one)."""
  c = presets.get_config(preset)
  c.ppo.update(settings)
  planner.check(c)
  plan = ppo.plan(c, topology.open_topology(where))
  base = trees.size(lora.base_params(plan.program.actor.params))
  return plan, base, trees.size(plan.program.actor.params) - base


def test_one_base_for_four_models():
  """2 bytes a weight of one base; 12 of what actor and critic train, 2 of a reward's adapters."""
  plan, base, adapters = held("llava15_7b_lora", "gpu:h100x1")
  score = plan.models.actor.language.width
  expected = 2 * base + 12 * (2 * adapters + score) + 2 * (adapters + score)
  assert sum(plan.held.values()) == pytest.approx(expected, rel=1e-4)
  assert plan.held["reference, besides"] == plan.held["critic, frozen, besides"] == 0
  assert plan.fits
  assert plan.topology.chip.memory == 60 * GIB
  # Prompts and answers less the last token, of 16 rows; keys and values of 32 heads, 32 layers.
  assert plan.cache == 16 * (2048 + 383) * 2 * 2 * 32 * 32 * 128
  assert "by formula only" in ppo_report.text(plan)


def test_whole_models_hold_their_own_weights():
  """16 bytes a trained weight less its gradient, a reference and a reward model: one tower."""
  plan, base, _ = held("rloo", "v5e:2x4")
  sizes = {part: trees.size(tree) for part, tree in plan.program.actor.params.items()}
  trained, tower = base - sizes["vision"], sizes["vision"]
  head = trees.size(plan.program.actor.params["language"]["head"])
  width = plan.models.actor.language.width
  expected = 12 * trained + 2 * tower + 2 * trained + 2 * (trained - head + width)
  assert sum(plan.held.values()) * 8 == pytest.approx(expected, rel=1e-3)
  assert "values" not in [phase.name for phase in plan.phases]


def test_what_is_refused(tiny):
  cpu = topology.open_topology("cpu:1")
  with pytest.raises(InputError, match="reward_model is planned beside the actor's own weights"):
    ppo_models.open_models(config(ppo__reward_model="runs/reward"))
  with pytest.raises(InputError, match="9 images of 16 tokens do not fit into prompts of config"):
    ppo.plan(config(data__max_images=9), cpu)
  with pytest.raises(InputError, match="config.ppo.num_samples is 1; rloo compares answers"):
    planner.check(config(ppo__estimator="rloo"))
