"""Tests that preference data with mistakes ends a run before anything is computed."""

import pytest

from scripts import train_dpo, train_reward
from tests import sft_run
from tests.bad_inputs.failing import fails
from tests.input_pipeline.test_preferences import make_config

SCRIPTS = {"reward": train_reward, "dpo": train_dpo}


@pytest.fixture
def pairs(records):
  """Returns the good records, each with a worse answer too."""
  for record in records:
    last = record["conversations"][-1]
    last["value"] = [last["value"], "something else"]
  return records


def _answers(value):
  return lambda record: record["conversations"][-1].update(value=value)


BAD = {
  "one answer only": (_answers("red"), ["conversations[3]: one answer only", "at least two"]),
  "a list of one": (_answers(["red"]), ["conversations[3]: one answer only", "at least two"]),
  "an empty list": (_answers([]), ["conversations[3]: the list of answers is empty", "give"]),
  "answers are not text": (_answers(["red", 7]), ['"value"[1] is a number', "give text"]),
  "too many": (_answers(list("abcdefghi")), ["9 answers, data.max_candidates is 8", "raise it"]),
  "a picture in an answer": (
    _answers([{"type": "text", "text": "red"}, {"type": "image"}]),
    ["conversations[3]: the answer holds a picture"],
  ),
  "a list in the middle": (
    lambda record: record["conversations"][1].update(value=["a", "b"]),
    ["conversations[1]: a list of answers; only the last message may have one"],
  ),
  "chosen without rejected": (
    lambda record: record.update(prompt=record.pop("conversations")[0]["value"], chosen="b"),
    ['"chosen" and "rejected" belong together, and "rejected" is missing', "give both"],
  ),
}


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("name", BAD)
def test_bad_preference_record(model, pairs, tmp_path, stage, name):
  spoil, expected = BAD[name]
  spoil(pairs[3])
  path = sft_run.write_json(tmp_path / "data" / "train.json", pairs)
  run = tmp_path / "run"
  expected = [f'{path}, record 3 ("id": "r3"): ', *expected]
  fails(expected, SCRIPTS[stage].train_and_evaluate, make_config(model, path, stage), str(run))
  assert not (run / "checkpoints").exists()


def test_no_record_has_two_answers(model, pairs, tmp_path):
  for record in pairs:
    _answers(["red", "red ", ""])(record)
  path = sft_run.write_json(tmp_path / "data" / "train.json", pairs)
  expected = ["data.train: no record that is shown has two different answers that fit"]
  run = str(tmp_path / "run")
  fails(expected, train_reward.train_and_evaluate, make_config(model, path), run)


def test_sft_of_ranked_answers(train, pairs):
  fails(["record 0", "for reward models and DPO; give one answer as text"], train, pairs)


def test_limit_of_answers(model, tmp_path):
  config = make_config(model, "train.json", **{"data.max_candidates": 1})
  run = str(tmp_path / "run")
  expected = ["config.data.max_candidates is 1; it must be at least 2"]
  fails(expected, train_reward.train_and_evaluate, config, run)
