"""Presets and settings of PPO."""

import pytest

from configs import ppo as presets
from vlalign_jax import stages
from vlalign_jax.errors import InputError


def make_config(preset: str = "demo", **overrides):
  config = presets.get_config(preset)
  config.data.train = "prompts.json"
  config.ppo.reward_model = "reward"
  config.update_from_flattened_dict(overrides)
  return config


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_pass_all_checks(preset):
  stages.check(make_config(preset), "ppo")


def test_an_unknown_preset_is_named():
  with pytest.raises(InputError, match="no PPO preset 'llava'; choose from demo"):
    presets.get_config("llava")


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"ppo.estimator": "ppo"}, "ppo.estimator is 'ppo'; choose from gae, rloo, grpo"),
    ({"ppo.reward_model": ""}, "nothing scores answers: give config.ppo.reward_model"),
    ({"ppo.reward_model": "", "ppo.reward_function": "a:b"}, 'critic_init is "reward".*"actor"'),
    (
      {"ppo.estimator": "rloo", "ppo.num_generations": 1},
      "num_generations is 1; rloo compares answers .* at least 2",
    ),
    (
      {"ppo.estimator": "grpo", "ppo.num_generations": 2, "ppo.critic_warmup": 1},
      "critic_warmup is 1, and grpo has no critic",
    ),
    ({"ppo.temperature": 0.0}, "ppo.temperature is 0"),
    ({"ppo.temperature": -1.0}, "ppo.temperature is -1.0; it must be at least 0"),
    ({"ppo.top_p": 0.0}, "ppo.top_p is 0.0; give more than 0"),
    ({"ppo.gamma": 1.5}, "ppo.gamma is 1.5; give more than 0 and at most 1"),
    ({"ppo.score_scale": 0.0}, "ppo.score_scale is 0.0; give more than 0"),
    ({"ppo.sft_weight": 0.1}, "sft_weight is 0.1, and config.ppo.sft_data ''; give both or"),
    ({"ppo.sft_data": "a.json"}, "sft_weight is 0.0, and config.ppo.sft_data 'a.json'; give both"),
    ({"ppo.kl_target": 6.0, "ppo.kl_coef": 0.0}, "kl_target is 6.0, and ppo.kl_coef"),
    ({"batch_size": 63}, "batch_size is 63; it must be a multiple of .* = 4"),
    ({"ppo.sample_parts": 3}, "ppo.sample_parts is 3; it must divide .* = 4"),
    ({"ppo.slots": 8, "ppo.sample_parts": 2}, "ppo.slots is 8, and ppo.sample_parts 2"),
    ({"ppo.cache_dtype": "int4"}, "ppo.cache_dtype is 'int4'; choose from model, int8"),
    ({"ppo.slots": 999}, "ppo.slots is 999, above batch_size, .*; lower it"),
    ({"lora.dropout": 0.1}, "lora.dropout is 0.1; choose from 0.0"),
    ({"data.pack": True}, "data.pack is True; choose from False"),
    ({"ppo.critic_zero_stage": 4}, "ppo.critic_zero_stage is 4; choose from None, 0, 1, 2, 3"),
    ({"ppo.min_new_tokens": 50}, "ppo.min_new_tokens is 50, above ppo.max_new_tokens"),
  ],
)
def test_settings_that_make_no_sense_are_refused(overrides, message):
  config = make_config()
  config.ppo.estimator = "gae"
  config.update_from_flattened_dict(overrides)
  with pytest.raises(InputError, match=message):
    stages.check(config, "ppo")
