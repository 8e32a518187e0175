"""A run whose updates cannot change its weights is refused; a run that hardly learns warns."""

import json
import os

import numpy as np
import pytest

from scripts import train_dpo, train_ppo, train_reward, train_sft
from tests import sft_run, tiny_models
from vlalign_jax import config as configs
from vlalign_jax import stages
from vlalign_jax.errors import InputError
from vlalign_jax.optim import optimizer, schedules, updates

PARAMS = {"language": {"embedding": {"embedding": np.zeros((3, 2))}, "x": {"scale": np.zeros(2)}}}


def config(stage: str = "sft", **optim):
  c = stages.defaults(stage)
  c.optim.update(optim)
  return c


def length(warmup: float) -> dict:
  """Returns the keys of a warm-up: a ratio up to 1, steps above."""
  return {"warmup_ratio": warmup} if warmup <= 1 else {"warmup_steps": int(warmup)}


@pytest.mark.parametrize("name", configs.SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_exactly_the_runs_whose_rates_are_all_zero_are_refused(name, warmup, count):
  c = config(schedule=name, **length(warmup))
  schedule = schedules.make_schedule(c.optim, c.optim.learning_rate, count)
  if any(float(schedule(step)) > 0 for step in range(count)):
    updates.check(c, PARAMS, count)
  else:
    assert count == 1  # a warm-up has a rate above 0 from its second update on
    with pytest.raises(
      InputError, match="has 1 update, all with learning rate 0.*set optim.warmup_.*=0"
    ):
      updates.check(c, PARAMS, count)


def test_only_rates_of_trained_groups_count():
  off = {"learning_rate": 0.0, "warmup_ratio": 0.0}
  with pytest.raises(InputError, match="set a learning rate of a trained part above 0"):
    updates.check(config(**off, projector_learning_rate=1.0), PARAMS, 40)
  assert "embeddings" in {optimizer.group_of("language/embedding/embedding")}
  updates.check(config(**off, embedding_learning_rate=1.0), PARAMS, 40)


@pytest.mark.parametrize(
  ("count", "warmup", "warnings"),
  [
    (9, 0.0, ["this run has only 9 updates"]),
    (10, 0.5, []),
    (10, 6.0, ["warm-up takes 6 of the 10 updates"]),
    (40, 500.0, ["warm-up takes 40 of the 40 updates"]),
    (2, 0.9, ["this run has only 2 updates", "warm-up takes 2 of the 2 updates"]),
  ],
)
def test_a_run_that_hardly_learns_warns(count, warmup, warnings, caplog):
  with caplog.at_level("WARNING"):
    updates.check(config(**length(warmup)), PARAMS, count)
  assert len(caplog.messages) == len(warnings)
  assert all(text in line for text, line in zip(warnings, caplog.messages, strict=True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("few")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory), 12)
  sft_run.write_json(directory / "sft.json", records)
  sft_run.write_json(directory / "ranked.json", sft_run.ranked(records))
  return directory


SCRIPTS = {"sft": train_sft, "reward": train_reward, "dpo": train_dpo, "ppo": train_ppo}
PPO = {
  "ppo.estimator": "gae",
  "num_train_epochs": 1.0,
  "max_steps": -1,
  "data.pack": False,
  "ppo.reward_model": "",
  "ppo.reward_function": "tests.rollout.scorers:length",
  "ppo.critic_init": "actor",
  "ppo.critic_warmup": 0,
  "ppo.num_ppo_epochs": 1,
  "ppo.num_mini_batches": 1,
}


@pytest.mark.parametrize("stage", [*SCRIPTS, "critic"])
def test_every_stage_refuses_before_it_computes(stage, directory, tmp_path):
  """12 records and a batch of 128: one update, at the start of the warm-up."""
  kind = "ranked" if stage in ("reward", "dpo") else "sft"
  overrides = {"batch_size": 128, "optim.warmup_ratio": 0.03}
  if stage == "dpo":
    overrides["dpo.reference"] = "cache"
  name = "this run"
  if stage in ("ppo", "critic"):
    overrides |= PPO
    name = "the actor"
  if stage == "critic":
    overrides |= {"optim.warmup_ratio": 0.0, "ppo.critic_learning_rate": 0.0}
    stage, name = "ppo", "the critic"
  c = sft_run.make_config(directory / "model", directory / f"{kind}.json", stage, **overrides)
  with pytest.raises(InputError, match=f"{name} has 1 update, all with learning rate 0"):
    SCRIPTS[stage].train_and_evaluate(c, str(tmp_path))
  assert not os.path.exists(tmp_path / "checkpoints")
  assert not os.path.exists(tmp_path / "reference")
  assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 128
