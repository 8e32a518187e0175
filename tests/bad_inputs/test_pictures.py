"""Tests pictures that cannot be decoded and records that are too long."""

import pathlib

import pytest

from tests import sft_run
from tests.bad_inputs.failing import fails, saved_steps
from vlalign_jax.data import bad_records
from vlalign_jax.data.records import Options
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare, sft
from vlalign_jax.weights import source


def _break(picture: pathlib.Path, how: str) -> None:
  content = picture.read_bytes()
  picture.write_bytes({"corrupt": b"no picture", "truncated": content[:-40], "empty": b""}[how])


@pytest.mark.parametrize("how", ["corrupt", "truncated", "empty"])
def test_unreadable_picture_ends_the_run(train, records, tmp_path, compile_cache, how, caplog):
  """...at its step; earlier checkpoints are complete, and on_bad_record=skip continues the run."""
  picture = tmp_path / "data" / "016.png"
  content = picture.read_bytes()
  _break(picture, how)
  expected = ['data/train.json, record 16 ("id": "r16")', "016.png", "cannot be decoded", "replace"]
  fails(expected, train, records)
  assert saved_steps(tmp_path) == [2, 4]  # record 16 is of step 5

  if how == "corrupt":
    with caplog.at_level("WARNING", logger="absl"):
      train(records, **{"data.on_bad_record": "skip"})
    (warning,) = [line for line in caplog.messages if "Left out of step 5" in line]
    for part in expected:
      assert part in warning
    bad = [line["bad_records"] for line in sft_run.read_metrics(tmp_path / "run")]
    assert bad == [0, 0, 0, 0, 1, 1]
  else:
    picture.write_bytes(content)
    train(records)
  assert saved_steps(tmp_path) == [4, 6]


def test_unreadable_picture_of_the_evaluation(train, records, tmp_path):
  """...ends the run before the first step, however late the first evaluation is."""
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[15:17])
  _break(tmp_path / "data" / "016.png", "truncated")
  expected = ['data/eval.json, record 1 ("id": "r16")', "016.png", "cannot be decoded"]
  fails(expected, train, records[:12], **{"data.eval": held_out})
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unreadable_picture_of_the_evaluation_is_skipped_and_counted(
  train, records, tmp_path, compile_cache
):
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[15:18])
  _break(tmp_path / "data" / "016.png", "truncated")
  settings = {"data.eval": held_out, "data.on_bad_record": "skip", "eval_every": 2}
  train(records[:12], **settings)
  lines = [line for line in sft_run.read_metrics(tmp_path / "run") if "eval/loss" in line]
  assert [(line["eval/bad_records"], line["eval/examples"]) for line in lines] == [(1, 2)] * 2
  assert [line["bad_records"] for line in lines] == [0, 0]


@pytest.mark.parametrize(("first", "last", "bad"), [(15, 20, 2), (16, 17, 1)])
def test_too_many_unreadable_pictures_of_the_evaluation(
  train, records, tmp_path, monkeypatch, compile_cache, first, last, bad
):
  """...before the first step, and where they become unreadable later."""
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[first:last])
  for index in (16, 18):
    _break(tmp_path / "data" / f"{index:03d}.png", "corrupt")
  read = f"data.eval: {bad} of {last - first} records could not be read"
  expected = [f"{read}, more than data.max_bad_records = 0.01"]
  settings = {"data.eval": held_out, "data.on_bad_record": "skip"}
  fails(expected, train, records[:12], **settings)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
  monkeypatch.setattr(prepare.Prepared, "read", lambda *_, **__: [])
  fails(expected, train, records[:12], **settings)
  assert saved_steps(tmp_path) == [2, 3]  # nothing is lost but the evaluation
  lines = sft_run.read_metrics(tmp_path / "run")
  assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (3, True)]


def test_too_many_unreadable_pictures(train, records, tmp_path, compile_cache):
  for index in (1, 16):  # 2 of 24
    _break(tmp_path / "data" / f"{index:03d}.png", "corrupt")
  expected = [
    "data.train: 2 of 24 records could not be read, more than data.max_bad_records = 0.01",
    "scripts/check_data.py",
  ]
  fails(expected, train, records, **{"data.on_bad_record": "skip"})


def test_the_same_unreadable_picture_in_every_epoch_is_not_too_many(compile_cache):
  """The limit is a share of what was shown: 1 of 150 records is 10 of 1500 examples."""
  skip = Options(on_bad_record="skip")
  bad_records.check("data.train", 10, 1500, skip)
  with pytest.raises(InputError):
    bad_records.check("data.train", 16, 1500, skip)


def test_too_long_records_are_counted(model, records, tmp_path, caplog):
  records[0]["conversations"][0]["value"] += " and" * 300
  records[3]["conversations"][2]["value"] += " and" * 300
  path = sft_run.write_json(tmp_path / "data" / "train.json", records)
  config = sft_run.make_config(model, path)
  train, _ = prepare.load_records(sft.TASK, config)
  with caplog.at_level("INFO", logger="absl"):
    prepared = prepare.prepare_train(sft.TASK, config, source.open_source(config.model), train, 1)
  assert prepared.records == 23
  assert "24 records; 1 skipped, their first answer does not fit" in caplog.text
  assert "1 turns dropped from the ends of 1 others" in caplog.text
  assert sorted(prepared.plan.examples) == list(range(1, 24))
