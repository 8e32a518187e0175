"""wandb and Trackio, offline: what they have is what metrics.jsonl has, also after a crash."""

import collections
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2

from tests import sft_run, tiny_models
from tests.writers import logged_run, offline

needs_trackio = pytest.mark.skipif(
  importlib.util.find_spec("trackio") is None, reason="see requirements-dev.txt"
)

ROOT = pathlib.Path(__file__).parents[2]


def environment(tmp_path) -> dict[str, str]:
  """Returns what keeps both writers on this machine, and all their files in tmp_path."""
  places = {
    name: str(tmp_path / name.lower())
    for name in (
      "WANDB_DIR",
      "WANDB_DATA_DIR",
      "WANDB_CACHE_DIR",
      "WANDB_CONFIG_DIR",
      "TRACKIO_DIR",
    )
  }
  return (
    os.environ | places | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
  )


def log(tmp_path, names: str, *crash: str) -> None:
  command = [sys.executable, "-m", "tests.writers.logged_run", str(tmp_path / "run"), names, *crash]
  done = subprocess.run(
    command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=120
  )
  assert done.returncode == bool(crash), done.stderr


def merged(lines: list[dict]) -> list[dict]:
  """Returns a line for each step, of the numbers that came last."""
  steps: dict[int, dict] = collections.defaultdict(dict)
  for line in lines:
    steps[line["step"]] |= line
  return [steps[step] for step in sorted(steps)]


def numbers(lines: list[dict]) -> list[dict]:
  """Returns lines without tables, and with null for a number that is not finite."""

  def finite(value):
    return None if value == "NaN" or (isinstance(value, float) and math.isnan(value)) else value

  kept = [{k: finite(v) for k, v in line.items() if "rollouts" not in k} for line in lines]
  return [line for line in kept if line.keys() != {"step"}]


def test_wandb(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "wandb")
  (path,) = offline.wandb_files(tmp_path)
  metrics = sft_run.read_metrics(tmp_path / "run")
  assert [line["step"] for line in metrics] == [1, 2, 3, 4]
  assert numbers(offline.wandb_lines(path)) == metrics
  (pictures,) = offline.wandb_pictures(path).values()
  assert len(pictures) == 1
  (run,) = [r.run for r in offline.wandb_records(path) if r.WhichOneof("record_type") == "run"]
  assert (run.project, run.display_name) == ("vlalign_jax", "run")


def test_wandb_goes_on_in_the_same_run_after_a_crash(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "wandb", "crash")
  log(tmp_path, "wandb")
  first, second = offline.wandb_files(tmp_path)
  assert first.name == second.name  # run-ID.wandb
  metrics = sft_run.read_metrics(tmp_path / "run")
  # Another process of wandb's writes, so the first file may lack what came just before the crash.
  assert numbers(offline.wandb_lines(second)) == metrics[2:]
  assert metrics[3]["perf/tokens_per_second"] == 2000.0  # of the second sitting
  assert metrics[3]["perf/seconds"] >= metrics[1]["perf/seconds"]


@needs_trackio
def test_trackio(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "trackio")
  log(tmp_path, "trackio")  # goes on from the checkpoint at step 2
  metrics = sft_run.read_metrics(tmp_path / "run")
  found = offline.trackio_lines(tmp_path / "trackio_dir", "vlalign_jax")
  ((name, lines),) = found.items()
  assert name.startswith("run-")
  assert [line["step"] for line in numbers(lines)] == [1, 2, 3, 4, 3, 4]
  assert numbers(merged(lines)) == metrics
  tables = [line["rollouts"]["_value"] for line in lines if "rollouts" in line]
  assert len(tables) == 2
  for with_picture, without in tables:
    assert (tmp_path / "trackio_dir" / "media" / with_picture["picture"]["file_path"]).is_file()
    assert {**with_picture, "picture": None} == dict(
      zip(logged_run.COLUMNS, ["a", None, "at 4", 0.5, True], strict=True)
    )
    assert without == dict(zip(logged_run.COLUMNS, logged_run.rows(4)[1], strict=True))


def board_lines(workdir: pathlib.Path) -> list[dict]:
  """Returns what TensorBoard shows of its files: a line for each step, without purged points."""
  lines: list[dict] = []
  for path in sorted(workdir.glob("events.*")):
    content, place = path.read_bytes(), 0
    while place < len(content):
      length = int.from_bytes(content[place : place + 8], "little")
      event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
      if event.session_log.status == event_pb2.SessionLog.START:
        lines = [line for line in lines if line["step"] < event.step]
      lines += [{"step": event.step, one.tag: one.simple_value} for one in event.summary.value]
      place += length + 16
  return merged(lines)


def test_tensorboard(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "tensorboard")
  metrics = sft_run.read_metrics(tmp_path / "run")
  assert metrics[0].pop("grad_norm") is None
  lines = board_lines(tmp_path / "run")
  assert math.isnan(lines[0].pop("grad_norm"))
  for found, line in zip(lines, metrics, strict=True):
    assert found == pytest.approx(line, rel=1e-6)  # float32


def test_tensorboard_replaces_the_points_after_a_checkpoint(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "tensorboard", "crash")
  lines = board_lines(tmp_path / "run")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]  # they were flushed before the crash
  (path,) = (tmp_path / "run").glob("events.*")
  path.rename(path.with_name("events.out.tfevents.0.first"))  # names count seconds
  log(tmp_path, "tensorboard")
  lines = board_lines(tmp_path / "run")
  assert [line["perf/tokens_per_second"] for line in lines] == [1000.0, 1000.0, 2000.0, 2000.0]
  (tmp_path / "run" / "metrics.jsonl").unlink()
  log(tmp_path, "tensorboard")  # starts again
  assert [line["loss"] for line in board_lines(tmp_path / "run")] == pytest.approx(
    [1 / (step + 1) for step in (1, 2, 3, 4)]
  )
  session = [line["perf/tokens_per_second"] for line in board_lines(tmp_path / "run")]
  assert session == [1000.0] * 4


def test_without_writers_metrics_are_written(tmp_path):
  (tmp_path / "run").mkdir()
  log(tmp_path, "")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
  assert len(sft_run.read_metrics(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["wandb", pytest.param("trackio", marks=needs_trackio)])
def test_a_training_run(tmp_path, writer):
  """It gives its writers the numbers of metrics.jsonl."""
  tiny_models.make_llava(str(tmp_path / "model"))
  records = sft_run.make_records(str(tmp_path / "data"), 12)
  train = sft_run.write_json(tmp_path / "data" / "train.json", records[:8])
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[8:])
  settings = {"data.eval": held_out, "log.writers": f"{writer},tensorboard", "eval_every": 1}
  settings |= {"log.project": "tests", "log.name": "tiny"}
  config = sft_run.make_config(tmp_path / "model", train, **settings)
  done = subprocess.run(
    [sys.executable, *sft_run.command_line(config, str(tmp_path / "run"))],
    cwd=ROOT,
    env=environment(tmp_path),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  metrics = sft_run.read_metrics(tmp_path / "run")
  assert len(metrics) == 2
  assert all("eval/loss" in line for line in metrics)
  if writer == "wandb":
    (path,) = offline.wandb_files(tmp_path)
    lines = offline.wandb_lines(path)
  else:
    ((name, lines),) = offline.trackio_lines(tmp_path / "trackio_dir", "tests").items()
    assert name.startswith("tiny-")
  assert lines == metrics
  for found, line in zip(board_lines(tmp_path / "run"), metrics, strict=True):
    assert found == pytest.approx(line, rel=1e-6)
  (last,) = [line for line in done.stderr.splitlines() if "look at " in line]
  assert (
    f"look at examples.html, metrics.jsonl in {tmp_path}/run; python scripts/report.py " in last
  )
  assert f"tensorboard --logdir {tmp_path}/run" in last
