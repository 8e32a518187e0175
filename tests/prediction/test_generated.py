"""Generated answers as lines: best of n, records without an answer, resumed predictions."""

import json
import os

import numpy as np
import pytest

from tests import parity
from tests.prediction import policy_and_reward
from vlalign_jax.prediction.predict import predict

SAMPLES = 3


@pytest.fixture(scope="module")
def config(models):
  """Returns a function that makes configs of best of 3; the prompt of "turns" does not fit."""
  settings = {
    "data.max_length": 67,
    "batch_size": 2,
    "reward_model": f"{models.directory}/reward",
    "generation.num_return_sequences": SAMPLES,
    "generation.temperature": 1.0,
  }
  return lambda **more: models.config(**settings, **more)


@pytest.fixture(scope="module")
def predicted(config, tmp_path_factory):
  """Returns (workdir, lines, records)."""
  workdir = str(tmp_path_factory.mktemp("generated"))
  return workdir, *predict(config(), workdir)


def read(workdir, name: str):
  with open(os.path.join(workdir, name), "rb") as file:
    return file.read()


def test_lines(predicted):
  workdir, lines, records = predicted
  assert [json.loads(line) for line in read(workdir, "predictions.jsonl").splitlines()] == lines
  assert os.listdir(workdir).count("rewards.jsonl") == 0
  places = [(line["record"], line.get("sample")) for line in lines]
  samples = [[None] if record.id == "turns" else range(SAMPLES) for record in records]
  assert places == [(number, n) for number, group in enumerate(samples) for n in group]
  for line in lines:
    if line["id"] == "turns":
      assert line["answer"] is None
      assert "data.max_length=67" in line["reason"]
    else:
      assert line["num_tokens"] <= 6
      assert line["logprob"] < 0
  # Ranked answers are compared with the best.
  assert [line["reference"] for line in lines[:2]] == ["The answer is B: no"] * 2
  assert lines[-1]["reference"] == f"0 {policy_and_reward.LONG}"


def test_scores_and_the_best(models, predicted):
  _, lines, records = predicted
  answered = [line for line in lines if line["answer"] is not None]
  expected = [models.torch_score(records[line["record"]], line["answer"]) for line in answered]
  assert parity.relative_error([line["reward"] for line in answered], expected) < 1e-5
  for start in range(0, len(answered), SAMPLES):
    best = [line["best"] for line in answered[start : start + SAMPLES]]
    assert best == [n == np.argmax(expected[start : start + SAMPLES]) for n in range(SAMPLES)]


def test_metrics(predicted):
  workdir, lines, _ = predicted
  numbers = json.loads(read(workdir, "metrics.json"))
  answered = [line for line in lines if line["answer"] is not None]
  assert numbers["records"] == 6
  assert numbers["unanswered"] == 1
  assert numbers["answers"] == len(answered) == 15
  assert numbers["choices"] == SAMPLES
  assert numbers["reward"] == pytest.approx(np.mean([line["reward"] for line in answered]))
  best = [line["reward"] for line in answered if line["best"]]
  assert numbers["best/reward"] == pytest.approx(np.mean(best))
  assert numbers["best/reward"] > numbers["reward"]


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_resumes_where_it_stopped(config, predicted, tmp_path, share):
  """Resumes after it was killed as it wrote answers, and as it wrote scores."""
  workdir, lines, _ = predicted
  for name in ("config.json", "inputs.json"):
    (tmp_path / name).write_bytes(read(workdir, name))
  unscored = [
    {name: line[name] for name in line if name not in ("reward", "best")}
    for line in lines
    if "reason" not in line
  ]
  content = "".join(json.dumps(line) + "\n" for line in unscored)
  (tmp_path / "predictions.jsonl").write_text(content[: int(len(content) * share)])
  if share == 1:
    scores = [{name: line[name] for name in ("record", "sample", "reward")} for line in lines[:4]]
    content = "".join(json.dumps(line) + "\n" for line in scores)
    (tmp_path / "rewards.jsonl").write_text(content[:-5])
  assert predict(config(), str(tmp_path))[0] == lines
  for name in ("predictions.jsonl", "metrics.json"):
    assert read(tmp_path, name) == read(workdir, name)


def test_finished(config, predicted, monkeypatch):
  workdir, lines, _ = predicted
  before = read(workdir, "predictions.jsonl")
  policy_and_reward.forbid(monkeypatch)
  assert predict(config(gallery=1), workdir)[0] == lines
  assert read(workdir, "predictions.jsonl") == before


def test_unreadable_image_is_left_out(models, tmp_path):
  (tmp_path / "bad.png").write_bytes(b"no picture")
  records = [{**policy_and_reward.RECORDS[0], "image": "bad.png"}, policy_and_reward.RECORDS[1]]
  (tmp_path / "records.json").write_text(json.dumps(records))
  settings = {"data.eval": str(tmp_path / "records.json"), "data.on_bad_record": "skip"}
  config = models.config(**settings, **{"generation.max_new_tokens": 1})
  lines, _ = predict(config, str(tmp_path / "out"))
  assert [line["answer"] is None for line in lines] == [True, False]
  assert "cannot be read" in lines[0]["reason"]
  page = read(tmp_path / "out", "gallery.html").decode()
  assert "bad.png&quot; under" in page
