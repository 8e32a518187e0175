"""Settings that the machine, the tokenizer or the run directory does not allow."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from scripts import train_sft
from tests import sft_run
from tests.bad_inputs.failing import fails, saved_steps
from vlalign_jax import storage


def test_mesh_that_does_not_fit(train, records):
  settings = {"mesh.data": 3, "mesh.fsdp": 7}
  fails(
    ["mesh.data=3, mesh.fsdp=7, mesh.tensor=1 make 21 devices, and there are", "whose product is"],
    train,
    records,
    **settings,
  )


def test_unknown_template(train, records):
  settings = {"data.template": "vicunna"}
  fails(['"vicunna" is not one of', 'did you mean "vicuna"?'], train, records, **settings)


def test_workdir_that_cannot_be_written(model, records, tmp_path):
  config = sft_run.make_config(model, sft_run.write_json(tmp_path / "data" / "train.json", records))
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    fails(
      [f"--workdir {workdir}", "cannot be written to"],
      train_sft.train_and_evaluate,
      config,
      str(workdir),
    )
  fails(["--workdir is missing"], train_sft.train_and_evaluate, config, "")


def test_workdir_that_is_a_url(model, records, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = sft_run.make_config(model, sft_run.write_json(tmp_path / "data" / "train.json", records))
  monkeypatch.setattr(storage, "_MODULES", ("gcsfs_that_is_missing",))
  expected = ["--workdir gs://bucket/run needs libraries", "pip install gcsfs google-cloud-storage"]
  fails(expected, train_sft.train_and_evaluate, config, "gs://bucket/run")
  expected = ["--workdir ftp://host/run: only gs:// is supported", "mount other storage"]
  fails(expected, train_sft.train_and_evaluate, config, "ftp://host/run")
  assert os.listdir(tmp_path) == ["data"]  # makedirs would take gs: for a directory


def test_workdir_that_holds_something_else(train, records, tmp_path):
  """...such as a model directory, whose config.json stays as it is."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text('{"model_type": "llava"}')
  fails(["run/config.json", "not the config of a run", "name another directory"], train, records)
  assert (tmp_path / "run" / "config.json").read_text() == '{"model_type": "llava"}'
  (tmp_path / "run" / "config.json").write_text('{"stage": "sft"')
  fails(["run/config.json", "cannot be read as JSON", "another directory"], train, records)


def test_ten_updates_in_a_row_that_are_not_finite(train, records, tmp_path, compile_cache):
  """...end the run, whenever it is resumed; what was saved stays, and is finite."""
  absurd = {"optim.learning_rate": 1e30, "optim.warmup_ratio": 0.0, "optim.schedule": "constant"}
  expected = ["step 11: loss or gradient was not finite for 10 updates", "lower optim.learning"]
  for _ in range(2):
    fails(expected, train, records, **absurd, num_train_epochs=4.0, save_every=4)
    assert saved_steps(tmp_path) == [4, 8]
    lines = sft_run.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[0]["loss"] > 0
    assert [(line["loss"], line["skipped_steps"]) for line in lines[1:]] == [
      (None, skipped) for skipped in range(1, 10)
    ]
  with ocp.StandardCheckpointer() as reader:
    saved = [reader.restore(tmp_path / "run" / "checkpoints" / s / "params") for s in "48"]
  jax.tree.map(np.testing.assert_array_equal, *saved)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
