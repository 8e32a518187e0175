"""scripts/check_data.py: everything that is bad is found, and what is good is counted right."""

import re

import numpy as np
import pytest

from scripts import check_data
from tests import sft_run, tiny_models
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import report


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tiny_models.make_llava(str(directory))
  return directory


@pytest.fixture
def data(tmp_path):
  """Twelve good records: pictures but for 4 and 9, second turns at 3, 7, 11, two pictures at 6."""
  return sft_run.make_records(str(tmp_path), 12)


def _check(model, directory, records, show=0, **overrides):
  path = sft_run.write_json(directory / "train.json", records)
  return check_data.check_data(sft_run.make_config(model, path, **overrides), show)


def test_counts_of_good_data(model, tmp_path, data, capsys):
  (found,) = _check(model, tmp_path, data, batch_size=6)
  assert not found.problems
  assert found.files == {str(tmp_path / "train.json"): (12, 0)}
  assert found.images == 10  # of 12 drawn, 4 and 9 are not shown
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
  learnt = len(tokenizer(" red", add_special_tokens=False).input_ids) + 1  # and the eos
  expected = len(tokenizer(text).input_ids) + patches - 1 + learnt
  assert (found.measured[0].tokens, found.measured[0].learned) == (expected, learnt)

  steps, rows, length, images, used = re.search(
    r"packed: (\d+) steps of (\d+) rows x (\d+) tokens, (\d+) pictures a row; ([\d.]+)%", printed
  ).groups()
  assert int(steps) == 2  # of six records each
  total = sum(one.tokens for one in found.measured)
  share = total / (2 * int(rows) * int(length))
  assert float(used) == pytest.approx(100 * share, abs=0.051)
  assert int(images) * int(rows) * 2 >= 10


def test_too_long_records_are_counted_and_not_bad(model, tmp_path, data, capsys):
  data[0]["conversations"][0]["value"] += "very long " * 50
  data[3]["conversations"][2]["value"] += "very long " * 50
  (found,) = _check(model, tmp_path, data)
  assert not found.problems
  printed = capsys.readouterr().out
  assert "12 records; 1 skipped, their first answer does not fit" in printed
  assert "; 1 turns dropped from the ends of 1 others" in printed
  assert found.measured[0].tokens == 0
  assert found.images == 9


def test_every_bad_record_is_listed(model, tmp_path, data, capsys):
  (tmp_path / "002.png").write_bytes(b"no picture")
  picture = tmp_path / "005.png"
  picture.write_bytes(picture.read_bytes()[:-40])
  (tmp_path / "008.png").unlink()
  data[1]["conversations"][1]["value"] = " "
  data[10]["image"] = ["010.png", "../x.png"]
  data[6]["conversations"][0]["value"] = "<image> one only"
  (found,) = _check(model, tmp_path, data)
  expected = {
    1: "conversations[1]: the answer is empty",
    2: 'image "002.png" .* cannot be decoded',
    5: 'image "005.png" .* cannot be decoded',
    6: "its questions hold 1 <image> but it has 2 images",
    8: 'image "008.png" not found',
    10: 'image "../x.png" leaves the image root',
  }
  assert len(found.problems) == len(expected)
  for index, reason in expected.items():
    where = re.escape(f'train.json, record {index} ("id": "r{index}"): ')
    assert any(re.search(where + reason.replace("[", r"\["), line) for line in found.problems)
  assert found.files == {str(tmp_path / "train.json"): (12, 6)}
  printed = capsys.readouterr().out
  assert "12 records, 6 bad" in printed
  assert all(problem in printed for problem in found.problems)


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
  (found,) = _check(model, tmp_path, data, **{"data.max_length": 16})
  assert found.problems == ("data.train: nothing can be learned from any record",)


def test_template_without_its_tokens_is_an_error(model, tmp_path, data):
  with pytest.raises(InputError, match="not one of .* did you mean"):
    _check(model, tmp_path, data, **{"data.template": "vicunna"})


def test_too_many_images_of_a_record(model, tmp_path, data):
  (found,) = _check(model, tmp_path, data, **{"data.max_images": 1})
  assert len(found.problems) == 1
  assert "record 6" in found.problems[0]
  assert "2 images, data.max_images is 1" in found.problems[0]


def test_joined_records_are_checked_as_the_run_joins_them(model, tmp_path, data):
  (found,) = _check(model, tmp_path, data, **{"data.max_images": 2, "data.concatenate": 6})
  assert len(found.records) == 2
  assert "4 images, data.max_images is 2; raise it or lower data.conc" in found.problems[0]
  (found,) = _check(model, tmp_path, data, **{"data.concatenate": 6})
  assert not found.problems


def test_shown_examples_mark_what_is_learnt(model, tmp_path, data, capsys):
  _check(model, tmp_path, [data[3], data[4]], show=5)
  printed = capsys.readouterr().out
  assert (
    "questions. USER: <image x 9>\nWhat color is it? ASSISTANT:« red<|end_of_text|>»USER: Is it a"
    " cat? ASSISTANT:« no, it is a picture<|end_of_text|>»\n"
  ) in printed
  assert "USER: Name a color: green ASSISTANT:« green<|end_of_text|>»\n" in printed


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
