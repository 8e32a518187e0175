"""Accuracy of pairs equals loops over them; calibration of scores from a known distribution."""

import itertools
import json
import math

import numpy as np
import pytest

from scripts.evaluate_reward import evaluate_reward
from tests.prediction import policy_and_reward
from vlalign_jax.errors import InputError
from vlalign_jax.prediction import metrics, reward_accuracy


@pytest.fixture
def lines() -> list[dict]:
  """Returns lines of records with 1 to 5 answers, with some equal scores and a missing rank."""
  rng = np.random.default_rng(0)
  lines = []
  for record in range(40):
    ranks = [rank for rank in range(rng.integers(1, 6)) if (record, rank) != (7, 1)]
    scores = np.round(rng.normal(size=len(ranks)) - 0.5 * np.array(ranks), 1)
    lines += [
      {"record": record, "rank": rank, "answer": f"{rank}", "reward": float(score)}
      for rank, score in zip(ranks, scores, strict=True)
    ]
  return lines


def test_numbers_of_pairs(lines):
  numbers = reward_accuracy.evaluate(lines, metrics.ranked_pairs(lines))
  pairs, per_record, first = [], [], []
  for _, group in itertools.groupby(lines, lambda line: line["record"]):
    group = list(group)
    differences = [
      (len(group), worse["rank"] - better["rank"], better["reward"] - worse["reward"])
      for better, worse in itertools.combinations(group, 2)
    ]
    if differences:
      pairs += differences
      per_record.append(sum(d > 0 for *_, d in differences) / len(differences))
      first.append(group[0]["reward"] > max(line["reward"] for line in group[1:]))

  def check(numbers, differences):
    n = len(differences)
    accuracy = sum(d > 0 for d in differences) / n
    assert numbers["pairs"] == n
    assert numbers["accuracy"] == pytest.approx(accuracy)
    assert numbers["accuracy_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / n))
    assert numbers["ties"] == pytest.approx(sum(d == 0 for d in differences) / n)
    assert numbers["margin"] == pytest.approx(sum(differences) / n)
    loss = sum(-math.log(1 / (1 + math.exp(-d))) for d in differences) / n
    assert numbers["loss"] == pytest.approx(loss)

  check(numbers, [d for *_, d in pairs])
  assert 0 < numbers["ties"] < 0.2
  for name, index in (("by_answers", 0), ("by_distance", 1)):
    keys = {pair[index] for pair in pairs}
    assert numbers[name].keys() == set(map(str, keys))
    for key in keys:
      check(numbers[name][str(key)], [pair[2] for pair in pairs if pair[index] == key])
  assert numbers["records"] == len(per_record)
  assert numbers["answers"] == len(lines)
  assert numbers["record_accuracy"] == pytest.approx(np.mean(per_record))
  assert numbers["best_first"] == pytest.approx(np.mean(first))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_calibration(scale):
  """Draws pairs by Bradley-Terry; scores three times as far apart are overconfident."""
  rng = np.random.default_rng(0)
  lead = np.abs(rng.normal(size=200_000))
  differences = np.where(rng.random(len(lead)) < 1 / (1 + np.exp(-lead)), lead, -lead)
  numbers = reward_accuracy.calibrate(scale * differences)
  assert sum(group["pairs"] for group in numbers["bins"]) == len(lead)
  expected = np.mean(1 / (1 + np.exp(-scale * lead)) - 1 / (1 + np.exp(-lead)))
  assert numbers["error"] == pytest.approx(expected, abs=0.004)
  for group in numbers["bins"]:
    assert group["low"] <= group["predicted"] <= group["high"]


def test_calibration_of_ties():
  numbers = reward_accuracy.calibrate(np.zeros(5))
  assert numbers["error"] == 0
  assert [(group["pairs"], group["observed"]) for group in numbers["bins"]] == [(5, 0.5)]


def test_script(models, tmp_path):
  config = models.config(**{"model.init_from": f"{models.directory}/reward"})
  numbers = evaluate_reward(config, str(tmp_path), wrong=3)
  assert json.loads((tmp_path / "reward.json").read_text()) == numbers
  lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
  scores = {}
  for line in lines:
    scores.setdefault(line["record"], []).append(line["reward"])
  right = [a > b for group in scores.values() for a, b in itertools.combinations(group, 2)]
  assert numbers["pairs"] == len(right) == 10
  assert numbers["accuracy"] == np.mean(right)
  page = (tmp_path / "reward.html").read_text()
  assert page.count("<svg") == 2
  assert page.count("<section>") == min(3, right.count(False))


def test_nothing_to_compare(models, tmp_path):
  (tmp_path / "records.json").write_text(json.dumps(policy_and_reward.RECORDS[:2]))
  settings = {"model.init_from": f"{models.directory}/reward"}
  config = models.config(**settings, **{"data.eval": str(tmp_path / "records.json")})
  config.data.images = models.directory
  with pytest.raises(InputError, match="no record has two different answers"):
    evaluate_reward(config, str(tmp_path / "out"))
