"""Mistakes in prediction end in one line that names them and says what to do."""

import json
import shutil

import pytest

from tests.prediction import policy_and_reward
from vlalign_jax.errors import InputError
from vlalign_jax.prediction.predict import predict
from vlalign_jax.stages import defaults

SETTINGS = {
  "mode": ({"mode": "speak"}, "config.mode is 'speak'; choose from generate, logprobs, reward"),
  "no model": ({"model.init_from": ""}, "config.model.init_from is empty"),
  "no data": ({"data.eval": ""}, "config.data.eval is empty"),
  "batch": ({"batch_size": 0}, "config.batch_size is 0"),
  "stop token": ({"generation.stop_tokens": "</s>"}, "'</s>', which is not a token"),
  "equal samples": ({"generation.num_return_sequences": 2}, "raise the temperature"),
  "reward model for other modes": (
    {"mode": "logprobs", "reward_model": "reward"},
    "name it in config.model.init_from with config.mode",
  ),
  "reward model as policy": (
    {"model.init_from": "reward"},
    "config.model.init_from=.*reward is a reward model, which has no language head",
  ),
  "policy as reward model": ({"mode": "reward"}, "policy is a policy, which has no score head"),
  "policy as reward_model": (
    {"reward_model": "policy"},
    "config.reward_model=.*policy is a policy, which has no score head",
  ),
  "nothing fits": ({"data.max_length": 20}, "no prompt of 6 records fits data.max_length=20"),
  "no answer fits": (
    {"data.max_length": 20, "mode": "logprobs"},
    "no answer of 6 records fits behind its prompt in data.max_length=20",
  ),
  "bucket": ({"workdir": "gs://bucket/out"}, "buckets do not"),
  "no directory": ({"workdir": ""}, "--workdir is missing"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(models, tmp_path, name, monkeypatch):
  policy_and_reward.forbid(monkeypatch)
  settings, expected = SETTINGS[name]
  settings = dict(settings)
  workdir = settings.pop("workdir", str(tmp_path))
  for key in ("model.init_from", "reward_model"):
    if settings.get(key):
      settings[key] = f"{models.directory}/{settings[key]}"
  if name == "nothing fits":  # an error that comes after loading
    monkeypatch.undo()
  with pytest.raises(InputError, match=expected) as caught:
    predict(models.config(**settings), workdir)
  assert "\n" not in str(caught.value)


def test_config_of_training(tmp_path):
  with pytest.raises(
    InputError, match="a config of the stage 'sft'; give --config=configs/predict"
  ):
    predict(defaults("sft"), str(tmp_path))
  with pytest.raises(InputError, match="--config is missing"):
    predict(None, str(tmp_path))


def test_unknown_key_and_wrong_type(models, tmp_path):
  config = models.config()
  with config.unlocked():
    config.generation.top_t = 3
  with pytest.raises(InputError, match="unknown key config.generation.top_t; did you mean"):
    predict(config, str(tmp_path))
  config = models.config()
  with config.ignore_type():
    config.batch_size = "4"
  with pytest.raises(InputError, match="config.batch_size is '4'; it must be of type int"):
    predict(config, str(tmp_path))


def test_a_record_without_an_answer(models, tmp_path):
  entry = {"conversations": [{"from": "human", "value": "What?"}]}
  (tmp_path / "records.json").write_text(json.dumps([policy_and_reward.RECORDS[1], entry]))
  config = models.config(mode="logprobs", **{"data.eval": str(tmp_path / "records.json")})
  with pytest.raises(InputError, match=r"records.json, record 1: it has no answer"):
    predict(config, str(tmp_path / "out"))


@pytest.fixture
def begun(models, tmp_path):
  """Returns (tmp_path, function that makes configs): `out` there has a line of a prediction."""
  shutil.copy(models.data, tmp_path / "records.json")
  settings = {"data.eval": str(tmp_path / "records.json"), "data.images": models.directory}
  config = lambda **more: models.config(mode="logprobs", **settings, **more)  # noqa: E731
  with pytest.raises(InputError, match="fits"):  # fails after it has made the directory
    predict(config(**{"data.max_length": 20}), str(tmp_path / "out"))
  line = {"record": 0, "answer": "The answer is B: no", "logprob": -1.0, "num_tokens": 1}
  (tmp_path / "out" / "predictions.jsonl").write_text(json.dumps(line) + "\n")
  return tmp_path, lambda **more: config(**{"data.max_length": 20, **more})


def test_another_config(begun):
  directory, config = begun
  with pytest.raises(InputError, match=r"another config \(seed: 1234 there, 5 now\)"):
    predict(config(seed=5), str(directory / "out"))
  with pytest.raises(InputError, match="no answer"):  # a harmless key may change
    predict(config(gallery=5), str(directory / "out"))


def test_other_records(begun):
  directory, config = begun
  (directory / "records.json").write_text(json.dumps(policy_and_reward.RECORDS[:3]))
  with pytest.raises(InputError, match="another content of config.data.eval"):
    predict(config(), str(directory / "out"))


def test_damaged_line(begun):
  directory, config = begun
  path = directory / "out" / "predictions.jsonl"
  path.write_text("{nothing\n" + path.read_text())
  with pytest.raises(InputError, match="predictions.jsonl, line 1: damaged"):
    predict(config(), str(directory / "out"))


def test_directory_of_a_training_run(models, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"stage": "sft"}))
  with pytest.raises(InputError, match="has a run of the stage 'sft'"):
    predict(models.config(), str(tmp_path))
