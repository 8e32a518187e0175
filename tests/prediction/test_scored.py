"""Log-probabilities and scores of all answers of all records equal torch's."""

import json
import pathlib

import numpy as np
import pytest

from tests import parity
from tests.prediction import policy_and_reward
from vlalign_jax.prediction import metrics
from vlalign_jax.prediction.predict import predict
from vlalign_jax.prediction.records import record_answers


@pytest.fixture(scope="module")
def log_probabilities(models, tmp_path_factory):
  """Returns (workdir, lines, records) of mode logprobs."""
  workdir = str(tmp_path_factory.mktemp("logprobs"))
  return workdir, *predict(models.config(mode="logprobs"), workdir)


def all_answers(records) -> list[tuple[int, int, str]]:
  return [
    (number, rank, answer)
    for number, record in enumerate(records)
    for rank, answer in enumerate(record_answers(record))
  ]


def test_no_answer_is_missing(log_probabilities):
  _, lines, records = log_probabilities
  answers = [(line["record"], line.get("rank", 0), line["answer"]) for line in lines]
  assert answers == all_answers(records)
  assert len(answers) == 12
  assert ["rank" in line for line in lines] == [bool(records[n].answers) for n, _, _ in answers]
  assert not any("reason" in line for line in lines)
  assert lines[5]["history"] == [["<image>\nWhat is it?", "A thing."]]
  assert lines[5]["prompt"] == "Which?"


def test_log_probabilities(models, log_probabilities):
  """The answers of "apart" do not fit into one row; an empty answer is its end token alone."""
  _, lines, records = log_probabilities
  for line in lines:
    expected = models.torch_log_probabilities(records[line["record"]], line["answer"])
    assert parity.relative_error(line["token_logprobs"], expected) < 1e-5
    assert line["num_tokens"] == len(expected)
    assert line["logprob"] == pytest.approx(expected.sum(dtype=float), rel=1e-5)
  assert min(line["num_tokens"] for line in lines) < 4


def test_metrics(log_probabilities):
  workdir, lines, _ = log_probabilities
  with open(f"{workdir}/metrics.json", encoding="utf-8") as file:
    numbers = json.load(file)
  assert numbers["answers"] == 12
  assert numbers["records"] == 6
  assert numbers["pairs"] == 3 + 1 + 6
  pairs = [
    better["logprob"] > worse["logprob"]
    for better in lines
    for worse in lines
    if better["record"] == worse["record"] and better.get("rank", 0) < worse.get("rank", 0)
  ]
  assert numbers["pair_accuracy"] == np.mean(pairs)
  assert numbers["logprob"] == pytest.approx(np.mean([line["logprob"] for line in lines]))


def test_resumes_where_it_stopped(models, log_probabilities, tmp_path, monkeypatch):
  workdir, lines, _ = log_probabilities
  content = pathlib.Path(workdir, "predictions.jsonl").read_bytes()
  for name in ("config.json", "inputs.json"):
    (tmp_path / name).write_bytes(pathlib.Path(workdir, name).read_bytes())
  path = tmp_path / "predictions.jsonl"
  path.write_bytes(content[: len(content) * 2 // 3])  # in the middle of a line
  assert predict(models.config(mode="logprobs"), str(tmp_path))[0] == lines
  assert path.read_bytes() == content
  policy_and_reward.forbid(monkeypatch)
  assert predict(models.config(mode="logprobs"), str(tmp_path))[0] == lines


def test_scores(models, tmp_path):
  """Writes a line with the reason for an answer that does not fit."""
  config = models.config(mode="reward", **{"data.max_length": 79})
  config.model.init_from = f"{models.directory}/reward"
  lines, records = predict(config, str(tmp_path))
  assert [(line["record"], line.get("rank", 0)) for line in lines] == [
    (number, rank) for number, rank, _ in all_answers(records)
  ]
  expected = [models.torch_score(records[line["record"]], line["answer"]) for line in lines]
  fits = [
    len(models.example(records[line["record"]], line["answer"]).tokens) <= 79 for line in lines
  ]
  assert 0 < sum(fits) < len(fits)
  rewards = [line["reward"] for line, fit in zip(lines, fits, strict=True) if fit]
  assert parity.relative_error(rewards, np.array(expected)[fits]) < 1e-5
  for line, fit in zip(lines, fits, strict=True):
    assert fit or (line["reward"] is None and "does not fit" in line["reason"])
  assert metrics.summarize_scored(lines, "reward")["left_out"] == fits.count(False)
