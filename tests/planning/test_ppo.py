"""The plan of PPO: its compiled programs, and what its models share."""

import dataclasses
import json

import numpy as np
import pytest

from configs import ppo as presets
from tests.planning import small
from vlalign_jax import trees
from vlalign_jax.errors import InputError
from vlalign_jax.models import lora, vlm
from vlalign_jax.planning import ppo, ppo_models, report, step_plan, topology, train_step
from vlalign_jax.steps import ppo_program, sampler

ADAPTED = {"lora__rank": 8, "train__projector": False}
# Wide, so that attention takes a small part of the operations.
MODEL = small.model(width=256)
MIXED = {"ppo__sft_weight": 1.0, "ppo__sft_data": "chats.json"}


@pytest.fixture
def tiny(monkeypatch):
  """Plans a tiny model in place of a published architecture."""
  monkeypatch.setattr(train_step.published, "published", lambda group: MODEL)


def config(**keys):
  settings = {"model__architecture": "small", "ppo__max_new_tokens": 24}
  return small.config("ppo", data__pack=False, **(settings | keys))


@pytest.mark.slow
@pytest.mark.parametrize(
  "keys",
  [
    # Two rows have about as many tokens of answers as the head takes at a time.
    {"train__vision": True, "grad_accumulation": 2, "ppo__max_new_tokens": 63, **MIXED},
    {"ppo__reward_function": "rules:score", "ppo__critic_init": "actor", **ADAPTED},
  ],
)
def test_flops_of_each_program_of_a_step(tiny, keys):
  """Counts 2 N T forward and 4 N T backward; the decoder runs to its longest answer."""
  c = config(**keys)
  small.check(c)
  plan = step_plan.compile_plan(ppo.plan(c, topology.open_topology("cpu:1")))
  programs = {program.name: program for program in plan.programs}
  assert "pictures" in programs
  assert ("reward model" in programs) == ("ppo__reward_function" not in keys)
  text = report.as_text(plan)
  assert max(map(len, text.splitlines())) <= 100
  assert ("no reward model is given" in text) == ("reward model" in programs)
  assert "fits: the chip has" in text
  numbers = json.loads(json.dumps(report.as_json(plan)))
  assert numbers["device_bytes"] == plan.total(plan.largest)

  params = vlm.abstract_params(MODEL)[1]
  language, head = params["language"]["layers"], params["language"]["head"]
  matrices = sum(
    leaf.size for path, leaf in trees.flatten(language).items() if path.endswith("kernel")
  )
  B, L, _, _, M, T = c.batch_size, 64, 1, 1, c.ppo.max_new_tokens, 64 + c.ppo.max_new_tokens + 1
  vocabulary = trees.size(head)
  # At least the layers over all tokens and the head over the answers; then attention, tower and
  # projector.
  sampled = 2 * B * ((L + M - 1) * matrices + M * vocabulary)
  assert sampled < programs["sampling"].compiled.flops < 1.5 * sampled
  scored = 2 * B * (T * matrices + M * vocabulary)
  assert scored < programs["reference"].compiled.flops < 1.5 * scored
  if "train__vision" in keys:  # actor, critic and conversations learn: each 6 N T
    learned = 6 * B / c.ppo.num_mini_batches * (2 * T + L) * matrices
    assert learned < programs["update"].compiled.flops < 2 * learned


def test_a_tpu_slice(tiny):
  """Compiles sampling for TPUs."""
  c = config(mesh__data=1, mesh__fsdp=-1, mesh__zero_stage=3, ppo__sampling_mesh="")
  plan = ppo.plan(c, topology.open_topology("v5e:2x2"))
  sampling = next(program for program in plan.programs if program.name == "sampling")
  plan = step_plan.compile_plan(dataclasses.replace(plan, programs=(sampling,)))
  sampling = plan.programs[0]
  assert plan.fits
  assert sampling.compiled.traffic["all-gather"].bytes > 0
  assert plan.seconds == sampling.time.total > 0
  assert "sampling" in report.as_text(plan)


def make_plan(preset: str, where: str, **settings):
  """Returns (plan, its rollout, the actor's number of base parameters, and of adapters)."""
  c = presets.get_config(preset)
  c.ppo.update(settings)
  c.mesh.tensor = 1
  small.check(c)
  devices = topology.open_topology(where)
  plan, models = ppo.plan(c, devices), ppo_models.open_models(c)
  program = ppo_program.make_program(
    c, models.actor, models.critic, models.reward, models.sampling, plan.mesh, 10
  )
  answers = sampler.make_sampler(
    c,
    models.actor,
    program.actor,
    models.sampling,
    plan.mesh,
    np.array([c.data.max_length]),
    held=0,
  )
  base = trees.size(lora.base_params(program.actor.params))
  rollout = ppo.RolloutShapes(c, models, plan.mesh, program, answers)
  return plan, rollout, base, trees.size(program.actor.params) - base


def resident_bytes(plan) -> float:
  return sum(plan.resident.values()) - plan.resident["batch of a rollout"]


def test_one_base_for_four_models():
  """Holds 2 bytes a weight of one base, 12 of each trained one, 2 of the reward's adapters."""
  plan, rollout, base, adapters = make_plan("llava15_7b_lora", "cpu:1")
  score = rollout.models.actor.language.width
  expected = 2 * base + 12 * (2 * adapters + score) + 2 * (adapters + score)
  assert resident_bytes(plan) == pytest.approx(expected, rel=1e-4)
  assert plan.resident["reference, unshared"] == plan.resident["critic, frozen, unshared"] == 0
  # 16 rows of a prompt and an answer without its last token; keys, values, 32 heads, 32 layers.
  assert ppo.cache_bytes(rollout) == 16 * (2048 + 383) * 2 * 2 * 32 * 32 * 128


def test_models_without_adapters_hold_their_own_weights():
  """Holds 12 bytes a trained weight, a reference and a reward model, but one tower."""
  plan, rollout, base, _ = make_plan("rloo", "v5e:2x4")
  params = rollout.program.actor.params
  tower = trees.size(params["vision"])
  trained = base - tower
  head = trees.size(params["language"]["head"])
  width = rollout.models.actor.language.width
  expected = 12 * trained + 2 * tower + 2 * trained + 2 * (trained - head + width)
  assert resident_bytes(plan) * 8 == pytest.approx(expected, rel=1e-3)
  assert "values" not in [program.name for program in plan.programs]


def test_configs_that_are_refused(tiny):
  cpu = topology.open_topology("cpu:1")
  with pytest.raises(InputError, match="can be planned only with the actor's own weights"):
    ppo_models.open_models(config(ppo__reward_model="runs/reward"))
  with pytest.raises(InputError, match="9 images of 16 tokens do not fit into prompts of config"):
    ppo.plan(config(data__max_images=9), cpu)
  with pytest.raises(InputError, match="config.ppo.num_generations is 1; rloo compares answers"):
    small.check(config(ppo__estimator="rloo"))
