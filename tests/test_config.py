"""Presets, and what config.check refuses."""

import pytest
from ml_collections import ConfigDict

from configs import sft
from vlalign_jax import config, stages
from vlalign_jax.errors import InputError


def _usable(preset: str = "llava15_7b", **overrides) -> ConfigDict:
  c = sft.get_config(preset)
  c.data.train = "train.json"
  for key, value in overrides.items():
    group, _, name = key.rpartition(".")
    holder = config.value(c, group) if group else c
    holder[name] = value
  return c


@pytest.mark.parametrize("preset", sft.PRESETS)
def test_presets_are_usable(preset):
  stages.check(_usable(preset), "sft")
  with pytest.raises(InputError, match="config.data.train is empty"):
    stages.check(sft.get_config(preset), "sft")


def test_every_preset_is_explained():
  assert all(preset in sft.__doc__ for preset in sft.PRESETS)


def test_presets_follow_the_published_recipe():
  """Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", Table 9."""
  first, second = sft.get_config("llava15_pretrain"), sft.get_config("llava15_7b")
  for c in (first, second):
    assert (c.optim.schedule, c.optim.warmup_ratio, c.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert c.num_train_epochs == 1.0
    assert (c.train.vision, c.train.projector) == (False, True)
  assert (first.optim.learning_rate, first.batch_size, first.train.language) == (1e-3, 256, False)
  assert (second.optim.learning_rate, second.batch_size, second.train.language) == (2e-5, 128, True)


@pytest.mark.parametrize("preset", sft.PRESETS)
def test_presets_of_large_models_split_everything_over_all_devices(preset):
  mesh = sft.get_config(preset).mesh
  expected = (-1, 1, 0) if preset == "demo" else (1, -1, 3)
  assert (mesh.data, mesh.fsdp, mesh.zero_stage) == expected


def test_unknown_preset():
  with pytest.raises(InputError, match="no SFT preset 'llava'; choose from demo, llava15_pretrain"):
    sft.get_config("llava")


BAD_VALUES = {
  "batch_size": (0, "config.batch_size is 0; it must be at least 1"),
  "grad_accumulation": (0, "at least 1"),
  "num_train_epochs": (0.0, "config.num_train_epochs must be above 0, or config.max_steps given"),
  "max_steps": (0, "give 1 or more, or -1 to go by num_train_epochs"),
  "save_total_limit": (0, "at least 1"),
  "save_best_limit": (-1, "at least 0"),
  "metric_for_best_model": ("eval/losses", "choose from eval/loss, eval/perplexity"),
  "model.dtype": ("int8", "config.model.dtype is 'int8'; choose from float32, bfloat16, float16"),
  "model.param_dtype": ("float16", "config.model.param_dtype is 'float16'; choose from float32, "),
  "model.remat": ("some", "choose from none, full"),
  "data.max_length": (1, "at least 2"),
  "data.concatenate": (0, "at least 1"),
  "data.eval_samples": ("5", "config.data.eval is empty; name files"),
  "data.on_bad_record": ("ignore", "choose from error, skip"),
  "data.workers": (-1, "at least 0"),
  "optim.schedule": ("cosin", "choose from linear, cosine"),
  "optim.learning_rate": (float("nan"), "is nan; give a finite number"),
  "optim.embedding_learning_rate": (-1.0, "at least 0"),
  "optim.warmup_ratio": (1.5, "give a share from 0 to 1, or config.optim.warmup_steps"),
  "optim.warmup_steps": (-1, "at least 0"),
  "optim.b2": (1.0, "it must be from 0 to below 1"),
  "optim.max_grad_norm": (-0.5, "at least 0"),
  "mesh.zero_stage": (4, "choose from 0, 1, 2, 3"),
  "lora.rank": (-1, "at least 0"),
  "lora.vision_rank": (-1, "at least 0"),
  "lora.dropout": (1.0, "it must be from 0 to below 1"),
  "lora.alpha": (0.0, "it must be above 0"),
  "lora.targets": ("query(", "is 'query(', no regular expression: missing )"),
  "lora.init_from": ("adapters", "config.lora.rank is 0; set it to the adapters' rank"),
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_values(key):
  value, expected = BAD_VALUES[key]
  with pytest.raises(InputError) as caught:
    stages.check(_usable(**{key: value}), "sft")
  assert f"config.{key}" in str(caught.value)
  assert expected in str(caught.value)
  assert "\n" not in str(caught.value)


def _check(content: dict):
  stages.check(ConfigDict(content), "sft")


def test_values_of_another_type():
  """...which only a config not made by `defaults` can hold: one that is read from JSON, say."""
  content = _usable().to_dict()
  _check(content)
  _check(content | {"num_train_epochs": 2})  # whole numbers are numbers
  with pytest.raises(InputError, match="config.batch_size is '4'; it must be of type int"):
    _check(content | {"batch_size": "4"})
  with pytest.raises(InputError, match="config.batch_size is True; it must be of type int"):
    _check(content | {"batch_size": True})
  with pytest.raises(InputError, match="config.seed is None; it must be of type int"):
    _check(content | {"seed": None})
  with pytest.raises(InputError, match="config.data is a group of keys, not 'x'"):
    _check(content | {"data": "x"})
  with pytest.raises(InputError, match="config.train.embeddings is 1; it must be of type bool"):
    _check(content | {"train": content["train"] | {"embeddings": 1}})


def test_unknown_and_missing_keys():
  content = _usable().to_dict()
  with pytest.raises(InputError, match="config.batchsize; did you mean config.batch_size?"):
    _check(content | {"batchsize": 4})
  with pytest.raises(InputError, match="config.data.shufle; did you mean config.data.shuffle?"):
    _check(content | {"data": content["data"] | {"shufle": True}})
  with pytest.raises(InputError, match="config.mesh is missing"):
    _check({key: value for key, value in content.items() if key != "mesh"})


def test_presets_refuse_unknown_keys_and_other_types_themselves():
  c = sft.get_config("demo").lock()
  with pytest.raises(AttributeError):
    c.batchsize = 4
  with pytest.raises(TypeError):
    c.batch_size = "4"


def test_config_of_another_stage_or_none():
  with pytest.raises(InputError, match="--config is missing: such as --config=configs/sft.py:"):
    stages.check(None, "sft")
  with pytest.raises(InputError, match="a config of the stage 'dpo', not 'sft'"):
    stages.check(_usable(stage="dpo"), "sft")


def test_the_best_of_nothing():
  with pytest.raises(
    InputError, match="config.save_best_limit is 1, and nothing is evaluated; give"
  ):
    stages.check(_usable(save_best_limit=1, eval_every=5), "sft")
  with pytest.raises(InputError, match="config.save_best_limit is 1, and config.eval_every is 0"):
    stages.check(_usable(save_best_limit=1, **{"data.eval_fraction": 0.1}), "sft")
  stages.check(_usable(save_best_limit=1, eval_every=5, **{"data.eval": "eval.json"}), "sft")


def test_nothing_to_train():
  parts = {f"train.{part}": False for part in ("vision", "projector", "language")}
  with pytest.raises(InputError, match="nothing to train: set one of config.train.vision"):
    stages.check(_usable(**parts), "sft")
  stages.check(_usable(**parts, **{"train.embeddings": True}), "sft")
  stages.check(_usable(**parts, **{"lora.vision_rank": 4}), "sft")
  of_head = stages.defaults("reward")
  of_head.data.train = "ranked.json"
  of_head.update_from_flattened_dict(parts)
  stages.check(of_head, "reward")


def test_only_conversations_are_joined():
  c = stages.defaults("dpo")
  c.data.update({"train": "a.json", "concatenate": 2})
  with pytest.raises(InputError, match=r"config.data.concatenate is 2; only conversations of sft"):
    stages.check(c, "dpo")
