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
  "answers_sft": {"exact_match": 0.95, "reward": 6.5},
  "answers_dpo": {"exact_match": 0.95, "reward": 6.5},
  "answers_sft_short": {"exact_match": 0.65, "reward": 4.8},
  "answers_ppo": {"exact_match": 0.7, "reward": 5.4},
  "divergence_dpo": {"kl": 0.1},
  "divergence_ppo": {"kl": 0.5},
}


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
    ("answers_dpo", "exact_match", 0.92, "error: DPO answers 92.0% word for word, and what it"),
    ("answers_ppo", "exact_match", 0.62, "error: PPO answers 62.0% word for word, and what it"),
    ("answers_ppo", "reward", 4.9, "error: PPO raises the score by 0.10; at least 0.2 is expected"),
  ],
)
def test_the_result_is_judged(run_name, metric, value, fault, tmp_path):
  for name, metrics in GOOD.items():
    metrics = metrics | ({metric: value} if name == run_name else {})
    (tmp_path / name).mkdir()
    if name.startswith(("answers_", "divergence_")):
      file = "metrics" if name.startswith("answers_") else "divergence"
      (tmp_path / name / f"{file}.json").write_text(json.dumps(metrics))
      continue
    evaluated = {f"eval/{key}": number for key, number in metrics.items()}
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, **evaluated}]
    (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  ended = run(sys.executable, "scripts/demo_result.py", str(tmp_path))
  shown = f"{value:.1%}" if metric not in ("rewards/margins", "reward") else f"{value:.1f}"
  assert shown in ended.stdout
  assert ended.stdout.count("\n") == 14
  assert ended.returncode == (1 if fault else 0)
  assert ended.stderr.startswith(fault or "")
  assert ended.stderr.count("\n") == (1 if fault else 0)
