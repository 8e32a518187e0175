"""The demo deletes nothing of the user's, and says so when the model has not learnt to see."""

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


@pytest.mark.parametrize(
  ("seeing", "blind", "fault"),
  [
    (0.93, 0.2, None),
    (0.89, 0.2, "error: 89.0% with pictures; at least 90% is expected\n"),
    (0.95, 0.6, "error: only 35.0 points better than with blanked pictures; at least 40 are"),
  ],
)
def test_the_result_is_judged(seeing, blind, fault, tmp_path):
  for name, share in (("sft", seeing), ("sft_blind", blind)):
    (tmp_path / name).mkdir()
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "eval/exact_match": share, "eval/examples": 300}]
    (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  ended = run(sys.executable, "scripts/demo_result.py", str(tmp_path))
  assert f"with pictures{seeing:19.1%}   of 300 examples" in ended.stdout
  assert f"with blanked pictures{blind:11.1%}   of 300 examples" in ended.stdout
  assert ended.returncode == (1 if fault else 0)
  assert ended.stderr.startswith(fault or "")
  assert ended.stderr.count("\n") == (1 if fault else 0)
