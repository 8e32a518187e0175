"""Runs that are resumed with something else, or from something damaged."""

import gc
import json
import os
import shutil
import warnings

import pytest

from scripts import export_hf, train_sft
from tests import sft_run
from tests.bad_inputs.failing import fails, saved_steps

RESUMED = {"data.shuffle": False, "save_every": 2, "save_total_limit": 3}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, compile_cache):
  """A finished run of six steps, saved at 2, 4 and 6, beside its data."""
  directory = tmp_path_factory.mktemp("finished")
  records = sft_run.make_records(str(directory / "data"), 24)
  path = sft_run.write_json(directory / "data" / "train.json", records)
  config = sft_run.make_config(model, path, **RESUMED)
  train_sft.train_and_evaluate(config, str(directory / "run"))
  return directory


@pytest.fixture
def resume(finished, model, tmp_path):
  """`(**overrides)`: repeats the command on the copy of the run in tmp_path / "run"."""
  shutil.copytree(finished / "run", tmp_path / "run")

  def run(train=finished / "data" / "train.json", **overrides):
    config = sft_run.make_config(model, train, **(RESUMED | overrides))
    train_sft.train_and_evaluate(config, str(tmp_path / "run"))

  return run


def test_another_config_is_refused(resume):
  message = fails(
    ["holds a run with another config", "repeat its command", "choose another --workdir"],
    resume,
    **{"batch_size": 8, "optim.learning_rate": 0.5, "log_every": 3},
  )
  assert "(batch_size: 4 there, 8 now; optim.learning_rate: 0.001 there, 0.5 now)" in message


def test_another_config_is_fine_before_anything_is_saved(resume, tmp_path):
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  resume(seed=7)
  assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 7
  assert len(sft_run.read_metrics(tmp_path / "run")) == 6


OTHER_DATA = {
  "longer question": (
    lambda text: text.replace("Is it a cat?", "Is it a cat, or is it not?"),
    ["as many records, but others"],
  ),
  "fewer records": (
    lambda text: json.dumps(json.loads(text)[:16]),
    ["6 steps then, 4 now", "24 records then, 16 now"],
  ),
  "more records": (
    lambda text: json.dumps(json.loads(text) + json.loads(text)[:1]),
    ["6 steps then, 7 now", "24 records then, 25 now"],
  ),
}


@pytest.mark.parametrize("done", [4, 6])
@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_is_refused(resume, finished, tmp_path, name, done):
  """...however far the run is: 16 records would make four steps."""
  steps = tmp_path / "run" / "checkpoints"
  if done == 4:
    shutil.rmtree(steps / "6")
  path = finished / "data" / "train.json"
  before = path.read_text()
  change, expected = OTHER_DATA[name]
  try:
    path.write_text(change(before))
    expected = [*expected, f"{tmp_path}/run", "restore the files of data.train", "new --workdir"]
    fails(expected, resume)
  finally:
    path.write_text(before)
  assert saved_steps(tmp_path) == [2, 4, 6][: done // 2]
  assert len(sft_run.read_metrics(tmp_path / "run")) == 6


def test_half_written_checkpoint_is_ignored(resume, finished, tmp_path):
  steps = tmp_path / "run" / "checkpoints"
  (steps / "6").rename(steps / "6.orbax-checkpoint-tmp")
  shutil.rmtree(steps / "6.orbax-checkpoint-tmp" / "optimizer")
  resume()
  assert saved_steps(tmp_path) == [2, 4, 6]
  _assert_same_metrics(tmp_path / "run", finished / "run")


def _assert_same_metrics(workdir, expected):
  lines, expected_lines = (
    [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]
    for lines in map(sft_run.read_metrics, (workdir, expected))
  )
  assert lines == expected_lines


def _truncate_largest(directory):
  files = [path for path in directory.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)


DAMAGES = {
  "array file cut off": lambda step: _truncate_largest(step / "params"),
  "parameters missing": lambda step: shutil.rmtree(step / "params"),
  "progress damaged": lambda step: (step / "progress" / "metadata").write_text("{"),
}


@pytest.fixture
def leftovers():
  """Ends here the coroutines that Orbax leaves behind when a file cannot be read."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
  resume, finished, tmp_path, caplog, name
):
  DAMAGES[name](tmp_path / "run" / "checkpoints" / "6")
  with caplog.at_level("INFO", logger="absl"):
    resume(save_every=1)  # step 5 is saved although a 6 stands there
  assert "checkpoints/6 cannot be read" in caplog.text
  assert "going on from step 4 of 6" in caplog.text
  assert "checkpoints/6 moved to" in caplog.text
  assert saved_steps(tmp_path) == [4, 5, 6]
  assert (tmp_path / "run" / "checkpoints-damaged-6").is_dir()
  _assert_same_metrics(tmp_path / "run", finished / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_no_checkpoint_can_be_read(resume, tmp_path):
  for step in (2, 4, 6):
    _truncate_largest(tmp_path / "run" / "checkpoints" / str(step) / "optimizer")
  fails(["none of the checkpoints [6, 4, 2] can be read", "in a new --workdir"], resume)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_export_of_a_damaged_checkpoint(finished, tmp_path):
  run = shutil.copytree(finished / "run", tmp_path / "run")
  _truncate_largest(run / "checkpoints" / "6" / "params")
  expected = [f"{run}/checkpoints/6 cannot be read", "move it away to use the checkpoint before"]
  fails(expected, export_hf.export_run, str(run), str(tmp_path / "exported"), None)
