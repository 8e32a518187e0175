"""Tests that scripts/check_data.py lists everything bad and counts the rest correctly."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import check_data
from tests import sft_run, tiny_models
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import data_page, report


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tiny_models.make_llava(str(directory))
  return directory


@pytest.fixture
def data(tmp_path):
  """Returns twelve good records: 4 and 9 without pictures, 6 with two; 3, 7, 11 with two turns."""
  return sft_run.make_records(str(tmp_path), 12)


def _check(model, directory, records, show=0, **overrides):
  path = sft_run.write_json(directory / "train.json", records)
  return check_data.check_data(sft_run.make_config(model, path, **overrides), show)


def test_counts_of_good_data(model, tmp_path, data, capsys):
  (checked,) = _check(model, tmp_path, data, batch_size=6)
  assert not checked.problems
  assert checked.files == {str(tmp_path / "train.json"): (12, 0)}
  assert checked.images == 10  # of 12 drawn, 4 and 9 are not shown
  printed = capsys.readouterr().out
  assert "15 turns, 10 pictures, 2 records without one" in printed
  assert "12 records; 0 skipped, their first answer does not fit data.max_length=192" in printed
  assert "; 0 turns dropped from the ends of 0 others" in printed
  assert printed.rstrip().endswith("no bad record")

  tokenizer = tiny_models.make_tokenizer()
  patches = (tiny_models.IMAGE_SIZE // tiny_models.PATCH_SIZE) ** 2
  system = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions. "
  )
  text = f"{system}USER: <image>\nWhat color is it? ASSISTANT:"
  learned = len(tokenizer(" red", add_special_tokens=False).input_ids) + 1  # and the eos
  expected = len(tokenizer(text).input_ids) + patches - 1 + learned
  assert (checked.measured[0].tokens, checked.measured[0].learned) == (expected, learned)

  steps, rows, length, images, used = re.search(
    r"packed: (\d+) steps of (\d+) rows x (\d+) tokens, (\d+) pictures a row; ([\d.]+)%", printed
  ).groups()
  assert int(steps) == 2  # of six records each
  total = sum(record.tokens for record in checked.measured)
  share = total / (2 * int(rows) * int(length))
  assert float(used) == pytest.approx(100 * share, abs=0.051)
  assert int(images) * int(rows) * 2 >= 10


def test_too_long_records_are_counted_and_not_bad(model, tmp_path, data, capsys):
  data[0]["conversations"][0]["value"] += "very long " * 50
  data[3]["conversations"][2]["value"] += "very long " * 50
  (checked,) = _check(model, tmp_path, data)
  assert not checked.problems
  printed = capsys.readouterr().out
  assert "12 records; 1 skipped, their first answer does not fit" in printed
  assert "; 1 turns dropped from the ends of 1 others" in printed
  assert checked.measured[0].tokens == 0
  assert checked.images == 9


def test_every_bad_record_is_listed(model, tmp_path, data, capsys):
  (tmp_path / "002.png").write_bytes(b"no picture")
  picture = tmp_path / "005.png"
  picture.write_bytes(picture.read_bytes()[:-40])
  (tmp_path / "008.png").unlink()
  data[1]["conversations"][1]["value"] = " "
  data[10]["image"] = ["010.png", "../x.png"]
  data[6]["conversations"][0]["value"] = "<image> one only"
  (checked,) = _check(model, tmp_path, data)
  expected = {
    1: "conversations[1]: the answer is empty",
    2: 'image "002.png" .* cannot be decoded',
    5: 'image "005.png" .* cannot be decoded',
    6: "its questions hold 1 <image> but it has 2 images",
    8: 'image "008.png" not found',
    10: 'image "../x.png" leaves the image root',
  }
  assert len(checked.problems) == len(expected)
  for index, reason in expected.items():
    where = re.escape(f'train.json, record {index} ("id": "r{index}"): ')
    assert any(re.search(where + reason.replace("[", r"\["), line) for line in checked.problems)
  assert checked.files == {str(tmp_path / "train.json"): (12, 6)}
  printed = capsys.readouterr().out
  assert "12 records, 6 bad" in printed
  assert all(problem in printed for problem in checked.problems)


def test_unusable_files_do_not_hide_others(model, tmp_path, data):
  good = sft_run.write_json(tmp_path / "good.json", data)
  empty = sft_run.write_json(tmp_path / "empty.json", [])
  config = sft_run.make_config(
    model, f"{good}, {tmp_path}/none.json", **{"data.eval": f"{empty},{good}"}
  )
  train, evaluation = check_data.check_data(config)
  assert train.problems == (f"{tmp_path}/none.json: no such file; check data.train and data.eval",)
  assert evaluation.problems == (f"{empty}: the list of records is empty; give at least one",)
  assert len(train.records) == len(evaluation.records) == 12


def test_nothing_to_learn_is_a_problem(model, tmp_path, data):
  (checked,) = _check(model, tmp_path, data, **{"data.max_length": 16})
  assert checked.problems == ("data.train: nothing can be learned from any record",)


def test_template_without_its_tokens_is_an_error(model, tmp_path, data):
  with pytest.raises(InputError, match="not one of .* did you mean"):
    _check(model, tmp_path, data, **{"data.template": "vicunna"})


def test_too_many_images_of_a_record(model, tmp_path, data):
  (checked,) = _check(model, tmp_path, data, **{"data.max_images": 1})
  assert len(checked.problems) == 1
  assert "record 6" in checked.problems[0]
  assert "2 images, data.max_images is 1" in checked.problems[0]


def test_joined_records_are_checked_as_the_run_joins_them(model, tmp_path, data):
  (checked,) = _check(model, tmp_path, data, **{"data.max_images": 2, "data.concatenate": 6})
  assert len(checked.records) == 2
  assert "4 images, data.max_images is 2; raise it or lower data.conc" in checked.problems[0]
  (checked,) = _check(model, tmp_path, data, **{"data.concatenate": 6})
  assert not checked.problems


def test_shown_examples_mark_what_is_learned(model, tmp_path, data, capsys):
  _check(model, tmp_path, [data[3], data[4]], show=5)
  printed = capsys.readouterr().out
  assert (
    "questions. USER: <image x 9>\nWhat color is it? ASSISTANT:« red<|end_of_text|>»USER: Is it a"
    " cat? ASSISTANT:« no, it is a picture<|end_of_text|>»\n"
  ) in printed
  assert "USER: Name a color: green ASSISTANT:« green<|end_of_text|>»\n" in printed


def test_good_records_are_written_as_they_are(model, tmp_path, data):
  (tmp_path / "002.png").write_bytes(b"no picture")
  data[1]["conversations"][1]["value"] = " "
  data[5]["note"] = "kept"
  path = sft_run.write_json(tmp_path / "train.json", data)
  for name in ("good.json", "good.jsonl"):
    config = sft_run.make_config(model, path)
    (checked,) = check_data.check_data(config, write_good=str(tmp_path / name))
    assert len(checked.problems) == 2
    text = (tmp_path / name).read_text()
    good = json.loads(text) if name == "good.json" else list(map(json.loads, text.splitlines()))
    assert good == [record for number, record in enumerate(data) if number not in (1, 2)]
    (checked,) = check_data.check_data(sft_run.make_config(model, tmp_path / name))
    assert not checked.problems
  with pytest.raises(InputError, match="--write_good .* exists; remove it"):
    check_data.check_data(sft_run.make_config(model, path), write_good=str(tmp_path / "good.json"))


def test_good_rows_of_a_table_are_written_with_their_pictures(model, tmp_path, data):
  rows = [
    {"image": (tmp_path / f"00{n}.png").read_bytes(), **{"prompt": "Color?", "completion": answer}}
    for n, answer in enumerate(("red", "", "blue"))
  ]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
  cache = {"data.cache": str(tmp_path / "cache")}
  config = sft_run.make_config(model, tmp_path / "train.parquet", **cache)
  (checked,) = check_data.check_data(config, write_good=str(tmp_path / "good.jsonl"))
  assert ["row 1" in problem for problem in checked.problems] == [True]
  (again,) = check_data.check_data(sft_run.make_config(model, tmp_path / "good.jsonl", **cache))
  assert [record.images for record in again.records] == [
    record.images for record in checked.records
  ]


def test_the_page_shows_what_is_printed(model, tmp_path, data):
  data[1]["conversations"][1]["value"] = " "
  data[2]["license"] = "<MIT>"
  path = sft_run.write_json(tmp_path / "train.json", data)
  (checked,) = check_data.check_data(
    sft_run.make_config(model, path), page=str(tmp_path / "x.html")
  )
  page = (tmp_path / "x.html").read_text()
  assert "conversations[1]: the answer is empty" in page
  assert "Keys that nothing reads: license (1)" in page
  assert page.count("<section>") == data_page.SHOWN
  assert page.count("<img ") == sum(
    len(set(record.images)) for record in shown_records(checked.records)
  )
  assert "<mark>" in page


def shown_records(records):
  """Returns ten of eleven, spread evenly."""
  return [records[int(n)] for n in np.linspace(0, len(records) - 1, 10)]


def test_histogram():
  lines = report.histogram(np.array([10] * 4 + [11, 12, 13, 19, 20] + [33]), bins=4, width=8)
  assert lines == [
    "min: 10,  10 %: 10,  50 %: 11,  90 %: 20,  99 %: 33,  max: 33",
    "10 - 15  ########  7",
    "16 - 21  ###       2",
    "22 - 27            0",
    "28 - 33  ##        1",
  ]
  assert report.histogram(np.array([7]))[1] == f"7 - 7  {'#' * 40}  1"
