"""The demo deletes nothing of the user's, and says so when a stage has not learned enough."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, cwd=ROOT):
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_directory_that_holds_something_is_refused(absolute, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years of work")
  directory = str(tmp_path / "mine") if absolute else "mine"
  ended = run("bash", str(ROOT / "scripts" / "demo.sh"), directory, cwd=tmp_path)
  assert ended.returncode == 1
  assert ended.stdout == ""
  expected = f"error: {tmp_path}/mine is not empty; name another directory or empty it\n"
  assert ended.stderr == expected
  assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


GOOD = {
  "sft": {"exact_match": 0.93},
  "sft_blind": {"exact_match": 0.2},
  "reward": {"accuracy": 0.95},
  "dpo": {
    "logps/reference_accuracies": 0.95,
    "logps/accuracies": 0.98,
    "rewards/margins": 0.3,
  },
  "ppo": {"objective/scores": 5.4, "objective/kl": 0.5},
  "answers_sft": {"exact_match": 0.95, "reward": 6.5},
  "answers_dpo": {"exact_match": 0.95, "reward": 6.5},
  "answers_early": {"exact_match": 0.65, "reward": 3.8},
  "answers_ppo": {"exact_match": 0.8, "reward": 5.4},
  "divergence_dpo": {"kl": 0.1},
  "divergence_ppo": {"kl": 0.5},
}


def write_runs(directory, changed="", metric="", value=None):
  """Writes what the demo's runs leave behind, one metric of one of them changed."""
  for name, metrics in GOOD.items():
    metrics = metrics | ({metric: value} if name == changed else {})
    (directory / name).mkdir()
    if name.startswith(("answers_", "divergence_")):
      file = "metrics" if name.startswith("answers_") else "divergence"
      (directory / name / f"{file}.json").write_text(json.dumps(metrics))
      continue
    evaluated = {f"eval/{key}": number for key, number in metrics.items()}
    start = {"step": 0, "eval/objective/scores": 4.0} if name == "ppo" else {"step": 0}
    lines = [start, {"step": 1, "loss": 3.0}, {"step": 2, **evaluated}]
    (directory / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  config = {"model": {"init_from": "sft/checkpoints/150"}}
  (directory / "ppo" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("run_name", "metric", "value", "fault"),
  [
    ("sft", "exact_match", 0.93, None),
    ("answers_dpo", "exact_match", 0.94, None),
    ("sft", "exact_match", 0.89, "error: 89.0% with pictures; at least 90% is expected\n"),
    ("sft_blind", "exact_match", 0.58, "error: only 35.0 points better than with blanked pictures"),
    ("reward", "accuracy", 0.85, "error: the reward model ranks 85.0% right; 90% are expected"),
    ("dpo", "logps/accuracies", 0.95, "error: DPO does not prefer right answers more than SFT"),
    ("dpo", "rewards/margins", -0.1, "error: DPO does not prefer right answers more than SFT"),
    ("ppo", "objective/scores", 4.0, "error: PPO does not raise the score\n"),
    ("answers_dpo", "exact_match", 0.92, "error: DPO answers 92.0% word for word, and what it"),
    ("answers_ppo", "exact_match", 0.72, "error: PPO gains 7.0 points of right answers; at least"),
    ("answers_ppo", "reward", 4.2, "error: PPO raises the score by 0.40; at least 0.5 is expected"),
  ],
)
def test_the_result_is_judged(run_name, metric, value, fault, tmp_path):
  write_runs(tmp_path, run_name, metric, value)
  ended = run(sys.executable, "scripts/demo_result.py", str(tmp_path))
  shown = f"{value:.1f}" if metric in ("rewards/margins", "reward", "objective/scores") else None
  assert (shown or f"{value:.1%}") in ended.stdout
  assert ended.stdout.count("\n") == 10
  assert "SFT, step 150 " in ended.stdout
  assert ended.returncode == (1 if fault else 0)
  assert ended.stderr.startswith(fault or "")
  assert ended.stderr.count("\n") == (1 if fault else 0)


@pytest.mark.parametrize(("wrong", "fault"), [(60, None), (120, "error: 86.7% of the answers are")])
def test_answers_are_shown_and_judged(wrong, fault, tmp_path):
  (tmp_path / "answers").mkdir()
  lines = [
    {
      "images": [f"eval_{number // 3}.png"],
      "prompt": "<image>\nCount the discs.",
      "answer": "There are two.",
      "reference": "There are one." if number < wrong else "There are two.",
    }
    for number in range(900)
  ]
  (tmp_path / "answers" / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  (tmp_path / "answers" / "metrics.json").write_text(json.dumps({"exact_match": 1 - wrong / 900}))
  ended = run(sys.executable, "scripts/demo_result.py", str(tmp_path), "answers")
  first, *others = ended.stdout.splitlines()
  shown = "eval_0.png Count the discs. There are two. wrong: There are one."
  assert " ".join(first.split()) == shown
  assert len(others) == 6
  assert others[-2].endswith("right")
  assert others[-1] == f"{1 - wrong / 900:.1%} of 900 answers are right word for word"
  assert ended.returncode == (1 if fault else 0)
  assert ended.stderr.startswith(fault or "")
