"""Tests a run directory at a URL, in a bucket that is simulated in memory."""

import json
import os

import fsspec
import pytest
from etils.epath import backend

from scripts import check_data
from tests import sft_run, tiny_models
from vlalign_jax import storage
from vlalign_jax.errors import InputError
from vlalign_jax.runs import run_directory
from vlalign_jax.training import metrics
from vlalign_jax.writers.tensorboard import TensorBoard

RUN = "gs://bucket/runs/sft"


@pytest.fixture
def bucket(monkeypatch):
  """Puts fsspec's file system in memory in place of gs://; returns () -> {path: content}."""
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  memory.pseudo_dirs[:] = [""]
  monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: memory)
  monkeypatch.setattr(storage, "_MODULES", ())
  return lambda: {
    path.removeprefix(f"{RUN}/"): memory.cat(path).decode(errors="ignore") for path in memory.store
  }


def test_places():
  assert storage.is_url(RUN)
  assert not storage.is_url("/runs/sft")
  assert storage.absolute(RUN + "/") == RUN
  assert storage.absolute("runs") == os.path.abspath("runs")


def test_a_missing_library_is_named(monkeypatch):
  storage.check("runs/sft", "--workdir")
  with pytest.raises(InputError, match="only gs:// is supported; mount other storage"):
    storage.check("s3://bucket/run", "--workdir")
  for module in ("not_there_at_all", "os.not_there", "not.there.either"):
    monkeypatch.setattr(storage, "_MODULES", ("json", module))
    with pytest.raises(InputError, match="^--workdir gs://.* needs .*: pip install gcsfs google"):
      storage.check(RUN, "--workdir")


def test_directories_are_uploaded_and_downloaded(bucket, tmp_path):
  with storage.written(f"{RUN}/model") as directory:
    assert os.path.isdir(directory)
    for name in ("a.json", "b.json"):
      storage.write(os.path.join(directory, name), name)
  assert bucket() == {"model/a.json": "a.json", "model/b.json": "b.json"}
  copy = storage.local(f"{RUN}/model")
  assert sorted(os.listdir(copy)) == ["a.json", "b.json"]
  assert storage.local(str(tmp_path)) == str(tmp_path)
  with storage.written(str(tmp_path)) as directory:
    assert directory == str(tmp_path)


def test_a_run_directory(bucket):
  """It is made, is the same when it is opened again, and refuses another config."""
  config = sft_run.make_config("model", "train.json")
  assert not run_directory.open_run(RUN, config)
  assert json.loads(bucket()["config.json"]) == json.loads(json.dumps(config.to_dict()))
  storage.write(f"{RUN}/checkpoints/2/commit_success.txt", "")
  assert run_directory.open_run(RUN, config)
  with pytest.raises(InputError, match=r"\(seed: 1234 there, 5 now\)"):
    run_directory.open_run(RUN, sft_run.make_config("model", "train.json", seed=5))


def test_the_page_of_check_data(bucket, tmp_path):
  tiny_models.make_llava(tmp_path / "model")
  records = sft_run.make_records(str(tmp_path), 2)
  train = sft_run.write_json(tmp_path / "train.json", records)
  check_data.check_data(sft_run.make_config(tmp_path / "model", train), page=f"{RUN}/data.html")
  assert "<section>" in bucket()["data.html"]


def test_metrics(bucket):
  """They are in the bucket once they are flushed, and are continued from what is there."""
  log = metrics.MetricLog(RUN, 0, 4)
  log.write(1, {"loss": 3.0})
  log.write(2, {"loss": 2.0})
  assert "metrics.jsonl" not in bucket()
  log.flush()
  log.write(3, {"loss": 1.5})  # lost with the process
  assert len(bucket()["metrics.jsonl"].splitlines()) == 2

  board = TensorBoard(RUN, 1)
  log = metrics.MetricLog(RUN, 1, 4, writers=[board])
  log.write(2, {"loss": 2.5}, more_follow=True)
  assert not any(name.startswith("events.") for name in bucket())
  log.close()
  lines = [json.loads(line) for line in bucket()["metrics.jsonl"].splitlines()]
  assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
  assert any(name.startswith("events.") for name in bucket())
  board.close()


def test_metrics_are_uploaded_at_intervals(bucket, monkeypatch):
  monkeypatch.setattr(metrics, "UPLOAD_EVERY", 0.0)
  log = metrics.MetricLog(RUN, 0, 4)
  log.write(1, {"loss": 3.0})
  assert len(bucket()["metrics.jsonl"].splitlines()) == 1
  log.close()


def test_an_error_of_the_bucket_is_shown(bucket, monkeypatch):
  class HttpError(Exception):
    pass

  def refuse(*_):
    raise HttpError("Anonymous caller does not have storage.objects.create access, 401")

  monkeypatch.setattr(storage, "write", refuse)
  config = sft_run.make_config("model", "train.json")
  with pytest.raises(InputError, match=f"--workdir {RUN} cannot be written to: Anonymous caller"):
    run_directory.open_run(RUN, config)
