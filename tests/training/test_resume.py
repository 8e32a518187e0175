"""A killed or terminated and then resumed run gives bit for bit what an uninterrupted one does."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scripts import train_sft
from tests import sft_run, tiny_models
from vlalign_jax.runs import checkpoints as checkpoints_of_run

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
TIMING = "perf/"


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
  """`(**overrides) -> config` of a run of 60 steps with evaluation at its end."""
  directory = tmp_path_factory.mktemp("sft")
  tiny_models.make_llava(str(directory / "model"))
  records = sft_run.make_records(str(directory / "data"), 28)
  train = sft_run.write_json(directory / "data" / "train.json", records[:24])
  evaluation = sft_run.write_json(directory / "data" / "eval.json", records[24:])

  def make(**overrides):
    settings = {"data.eval": evaluation, "num_train_epochs": STEPS / 6, **overrides}
    return sft_run.make_config(directory / "model", train, **settings)

  return make


@pytest.fixture(scope="module")
def uninterrupted(make_config, tmp_path_factory, compile_cache):
  """The run directory that all others are compared with."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  train_sft.train_and_evaluate(make_config(), str(workdir))
  return workdir


def _training_metrics(workdir):
  """metrics.jsonl without timing, and without evaluation before the end."""
  lines = sft_run.read_metrics(workdir)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  return [
    {
      key: value
      for key, value in line.items()
      if not key.startswith(TIMING) and (line["step"] == STEPS or not key.startswith("eval/"))
    }
    for line in lines
  ]


def _final_state(workdir):
  place = pathlib.Path(workdir, "checkpoints", str(STEPS))
  with ocp.StandardCheckpointer() as reader:
    state = {item: reader.restore(place / item) for item in ("params", "optimizer")}
  leaves = jax.tree_util.tree_leaves_with_path(state)
  flat = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  assert len(flat) > 60
  return flat


def _assert_same_run(workdir, expected):
  assert _training_metrics(workdir) == _training_metrics(expected)
  state, expected_state = _final_state(workdir), _final_state(expected)
  assert state.keys() == expected_state.keys()
  for path, leaf in state.items():
    np.testing.assert_array_equal(leaf, expected_state[path], err_msg=path)


class _Process:
  """The command of a run in a process of its own, with everything it prints."""

  def __init__(self, config, workdir, environment):
    self.workdir = pathlib.Path(workdir)
    self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe might fill up)
    self.process = subprocess.Popen(
      [sys.executable, *sft_run.command_line(config, str(workdir))],
      cwd=ROOT,
      env=os.environ | environment,
      stdout=self.output,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  def wait_for(self, ready) -> None:
    """Returns when `ready()`; fails if the process ends before, or takes two minutes."""
    deadline = time.monotonic() + 120
    while not ready():
      if self.process.poll() is not None or time.monotonic() > deadline:
        pytest.fail(self.end(signal.SIGKILL)[1])
      time.sleep(0.002)

  def logged(self, step: int) -> bool:
    """Whether metrics.jsonl has come to a step."""
    try:
      return f'{{"step": {step}, ' in (self.workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
      return False

  def is_writing(self) -> bool:
    """Whether a checkpoint is half-written at this moment."""
    return any((self.workdir / "checkpoints").glob("*tmp*/*"))

  def end(self, number: int | None = None) -> tuple[int, str]:
    """Sends a signal if given, to the workers too; waits; returns (exit code, output)."""
    if number is not None:
      os.killpg(self.process.pid, number)
    code = self.process.wait(timeout=300)
    self.output.seek(0)
    return code, self.output.read()


def test_killed_and_terminated_run_ends_like_an_uninterrupted_one(
  make_config, uninterrupted, compile_cache, tmp_path
):
  config = make_config(save_every=2, eval_every=8)
  workdir = tmp_path / "run"

  run = _Process(config, workdir, compile_cache)
  run.wait_for(lambda: run.logged(11) and run.is_writing())
  code, output = run.end(signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  assert not run.logged(STEPS)

  config.data.workers = 2  # how rows are made, and when is evaluated, may change in between
  run = _Process(config, workdir, compile_cache)
  run.wait_for(lambda: run.logged(31))
  code, output = run.end(signal.SIGTERM)
  assert code == 0, output
  assert "going on from step" in output
  assert "SIGTERM: saved at step" in output
  assert not run.logged(STEPS)

  config.data.workers = config.eval_every = 0
  code, output = _Process(config, workdir, compile_cache).end()
  assert code == 0, output
  assert "Traceback" not in output
  _assert_same_run(workdir, uninterrupted)


def test_a_killed_run_with_all_of_xlas_optimizations(make_config, tmp_path):
  """Compiled as users compile it; in the other tests LLVM and XLA leave most optimizations out."""
  environment = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
  }
  config = make_config(save_every=10)
  code, output = _Process(config, tmp_path / "uninterrupted", environment).end()
  assert code == 0, output
  run = _Process(config, tmp_path / "killed", environment)
  run.wait_for(lambda: run.logged(21))
  code, output = run.end(signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  assert not run.logged(STEPS)
  code, output = _Process(config, tmp_path / "killed", environment).end()
  assert code == 0, output
  assert "going on from step" in output
  _assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.fixture(scope="module")
def saved_often(make_config, tmp_path_factory, compile_cache):
  """(config, directory) of the same run with checkpoints and evaluations in between."""
  config = make_config(save_every=7, eval_every=5, save_total_limit=3, save_best_limit=2)
  workdir = tmp_path_factory.mktemp("saved_often")
  train_sft.train_and_evaluate(config, str(workdir))
  return config, workdir


def test_saving_and_evaluating_do_not_change_training(saved_often, uninterrupted):
  _, workdir = saved_often
  _assert_same_run(workdir, uninterrupted)
  evaluated = [line["step"] for line in sft_run.read_metrics(workdir) if "eval/loss" in line]
  assert evaluated == list(range(5, STEPS + 1, 5))


def test_the_newest_and_the_best_are_kept(saved_often, tmp_path):
  """...an evaluated step is saved though it is none of save_every, and can be exported."""
  _, workdir = saved_often
  losses = {
    line["step"]: line["eval/loss"] for line in sft_run.read_metrics(workdir) if "eval/loss" in line
  }
  best = sorted(losses, key=lambda step: (losses[step], -step))[:2]
  assert set(os.listdir(workdir / "checkpoints")) == {str(s) for s in (55, 56, STEPS, *best)}
  found = checkpoints_of_run.find_run(f"{workdir}/checkpoints/best")
  assert checkpoints_of_run.find_step(*found, "eval/loss") == best[0]


def test_what_was_logged_after_the_checkpoint_is_logged_again(saved_often, uninterrupted, tmp_path):
  config, workdir = saved_often
  workdir = shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  with open(workdir / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"step": 61, "gr')
  train_sft.train_and_evaluate(config, str(workdir))
  _assert_same_run(workdir, uninterrupted)


def test_finished_run_is_left_as_it_is(make_config, uninterrupted, compile_cache, caplog):
  def content():
    return {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}

  before = content()
  with caplog.at_level("INFO", logger="absl"):
    train_sft.train_and_evaluate(make_config(), str(uninterrupted))
  assert content() == before
  assert f"is finished: all {STEPS} steps are done" in caplog.text
