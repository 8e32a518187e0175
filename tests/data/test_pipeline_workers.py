"""Tests the pipeline with worker processes: resume, errors, and how they end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.data.pipelines import check, expected, make, random_run, run
from vlalign_jax.errors import InputError


def test_worker_processes_resume_and_hand_an_input_error_over_at_its_step():
  plan, load = random_run(epochs=2)
  last = plan.steps - 1
  broken = plan.rows_of(last, 0)[0]  # in the first epoch, too, but the run resumes after that
  load = dataclasses.replace(load, bad_image=int(broken))
  with run(plan, load, workers=2, prefetch=1, on_bad_record="skip") as pipeline:
    for _ in range(last - 2):
      next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
  with pytest.raises(ValueError, match="closed"):
    next(pipeline)
  sound = dataclasses.replace(load, bad_image=-1)
  with run(plan, load, workers=1) as pipeline:
    pipeline.set_state(state)
    check(next(pipeline), expected(plan, sound, last - 2))
    check(next(pipeline), expected(plan, sound, last - 1))
    with pytest.raises(InputError) as info:
      next(pipeline)
  assert str(info.value) == f'train.json, record {broken}: image "bad.jpg" not found'
  assert pipeline.get_state()["step"] == last


def test_worker_processes_skip_and_hand_any_other_error_over(caplog):
  first, second, third = (int(e) for e in np.random.default_rng(0).permutation(3))
  texts = [0, 0, 0]
  texts[first], texts[second], texts[third] = 13, 17, 19  # see Load
  plan, load = make(texts, [[]] * 3, batch_size=1, row_multiple=1)
  with run(plan, load, workers=1, prefetch=1, on_bad_record="skip") as pipeline:
    assert next(pipeline)["skipped"].tolist() == [1]
    assert caplog.messages == [f"Left out of step 1: train.json, record {first}: no answer"]
    with pytest.raises(RuntimeError, match=rf"examples \[{second}\]: TwoPartError: odd") as info:
      next(pipeline)
    assert "raise TwoPartError" in "\n".join(info.value.__notes__)
    with pytest.raises(InputError, match="lack of memory"):
      next(pipeline)


SCRIPT = """
  import multiprocessing, sys, time
  from absl import app
  from tests.data.pipelines import random_run, run

  def main(argv):
    plan, load = random_run(epochs=50)
    pipeline = run(plan, load, workers=2)
    next(pipeline)
    print(len(multiprocessing.active_children()), flush=True)
    time.sleep(60)

  if __name__ == "__main__":
    app.run(main)
"""


def test_worker_processes_end_quietly_and_never_outlive_a_killed_parent(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  interrupted, killed = (
    subprocess.Popen(
      [sys.executable, script],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
      start_new_session=True,
    )
    for _ in range(2)
  )
  assert [parent.stdout.readline() for parent in (interrupted, killed)] == ["2\n", "2\n"]
  killed.kill()
  os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does: to the workers, too
  # Workers inherit the pipes, so these end when the last worker has.
  _, errors = interrupted.communicate(timeout=20)
  assert errors.count("Traceback") == 1
  assert errors.endswith("KeyboardInterrupt\n")
  killed.communicate(timeout=20)
