"""Tests that record files with mistakes end a run before anything is computed."""

import json

import pytest

from tests import sft_run
from tests.bad_inputs.failing import fails


def _edit(index, *path, value):
  def edit(records):
    holder = records[index]
    for key in path[:-1]:
      holder = holder[key]
    holder[path[-1]] = value
    return records

  return edit


BAD_FILES = {
  "image missing": (
    _edit(3, "image", value=["none.png"]),
    ['record 3 ("id": "r3")', 'image "none.png" not found under', "set data.images"],
  ),
  "image outside": (
    _edit(3, "image", value=["../../etc/passwd"]),
    ["record 3", 'image "../../etc/passwd" leaves the image root', "move it there"],
  ),
  "image absolute": (
    _edit(3, "image", value=["/etc/passwd"]),
    ["record 3", "absolute path outside of data.images", "set data.images to"],
  ),
  "more placeholders than images": (
    _edit(3, "conversations", 2, "value", value="<image> And this?"),
    ["record 3", "hold 2 <image> but it has 1 image", "agree"],
  ),
  "fewer placeholders than images": (
    _edit(6, "conversations", 0, "value", value="<image> What?"),
    ["record 6", "hold 1 <image> but it has 2 images", "agree"],
  ),
  "picture in an answer": (
    _edit(3, "conversations", 1, "value", value=[{"type": "image"}]),
    ["record 3", "conversations[1]: the answer holds a picture"],
  ),
  "wrong role": (
    _edit(3, "conversations", 1, "from", value="human"),
    ["record 3", 'conversations[1]: "from" is "human" where "gpt" is expected', "take turns"],
  ),
  "unknown role": (
    _edit(3, "conversations", 0, "from", value="narrator"),
    ["record 3", 'conversations[0]: "from" is "narrator" where "human" is expected'],
  ),
  "empty answer": (
    _edit(3, "conversations", 1, "value", value="  "),
    ["record 3", "conversations[1]: the answer is empty", "drop the record"],
  ),
  "empty question": (
    _edit(4, "conversations", 0, "value", value=""),
    ["record 4", "the question is empty"],
  ),
  "answer missing": (
    lambda records: [records[0] | {"conversations": records[0]["conversations"][:1]}],
    ["record 0", "the last question has no answer", "add it"],
  ),
  "value of another type": (
    _edit(3, "conversations", 1, "value", value=7),
    ["record 3", 'conversations[1]: "value" is a number', "give text"],
  ),
  "no conversations": (
    _edit(3, "conversations", value=[]),
    ["record 3", '"conversations" is empty', "give a list"],
  ),
  "record is not an object": (
    lambda records: [*records, "text"],
    ["record 24", "text, not an object"],
  ),
  "empty file": (lambda records: "", ["train.json", "the file is empty", "give a list"]),
  "empty list": (lambda records: [], ["train.json", "list of records is empty", "at least one"]),
  "malformed JSON": (
    lambda records: json.dumps(records, indent=1)[:-30],
    ["train.json", "malformed JSON at line", "fix it"],
  ),
  "a picture behind a URL": (
    _edit(3, "image", value="https://example.org/a/very/long/" + "path/" * 100 + "cat.jpg"),
    ["record 3", "is a URL, and pictures must be local: download it"],
  ),
  "a damaged picture as text": (
    _edit(3, "image", value="data:image/png;base64," + "x" * 40_001),
    ["record 3", "damaged data URI", "encode the picture anew"],
  ),
  "a very long value": (
    _edit(3, "image", value={"name": "x" * 40_000}),
    ["record 3", 'an object without "bytes" and "path"'],
  ),
  "a very long path": (_edit(3, "image", value="x" * 4000), ["record 3", "not found under"]),
  "a very long role": (
    _edit(3, "conversations", 0, "from", value="x" * 4000),
    ["record 3", 'where "human" is expected'],
  ),
  "video": (_edit(3, "video", value="a.mp4"), ["record 3", 'has "video"', "drop the record"]),
  "a file of neither kind": (lambda records: "text", ["is neither JSON, nor JSON lines"]),
  "not a list": (
    lambda records: records[0],
    ["train.json", "conversations, not a list of records", "[ ]"],
  ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_record_file(train, records, tmp_path, name):
  change, expected = BAD_FILES[name]
  fails(["data/train.json", *expected], train, change(records))
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_first_bad_record_counts_the_others(train, records):
  for index in (2, 5, 9):
    records[index]["conversations"][1]["value"] = ""
  fails(["record 2", "2 more records are bad", "scripts/check_data.py"], train, records)


def test_missing_files(train, records, tmp_path):
  fails(["none.json: no such file"], train, records, **{"data.eval": "none.json"})
  nowhere = str(tmp_path / "nowhere")
  fails([nowhere, "no such directory", "data.images"], train, records, **{"data.images": nowhere})


def test_nothing_to_learn(train, records):
  expected = ["data.train", "no record that is shown has an answer that fits data.max_length=16"]
  fails(expected, train, records, **{"data.max_length": 16})


def _too_long(records):
  turns = sft_run.conversation("why " * 300, "so")
  return [{"id": record["id"], "conversations": turns} for record in records]


@pytest.mark.parametrize(
  "length", [{"max_steps": 2}, {"num_train_epochs": 0.5}, {"num_train_epochs": 2.0}]
)
@pytest.mark.parametrize("weights", ["1,0", "0.1,0"])
def test_nothing_to_learn_where_the_weights_are(train, records, tmp_path, length, weights):
  """...are long records only; the others are never shown."""
  long = _too_long(records)
  good = sft_run.write_json(tmp_path / "data" / "good.json", records)
  settings = {"data.train": f"{tmp_path}/data/train.json,{good}", "data.repeats": weights}
  fails(["data.train: no record that is shown", "raise it"], train, long, **settings, **length)


def test_the_only_record_that_fits_is_not_drawn(train, records):
  """...in the hundredth of an epoch that is shown."""
  long = _too_long(records)
  settings = {"data.repeats": "0.01"}
  fails(["data.train: no record that is shown"], train, [records[0], *long], **settings)


def test_more_samples_than_records(train, records):
  fails(["has 24 records", "25 of data.samples"], train, records, **{"data.samples": "25"})


def test_bad_records_of_every_kind_are_left_out_by_choice(train, records, tmp_path, caplog):
  """...those that are bad by themselves, and those that do not go with the config."""
  records[3]["conversations"][1]["value"] = " "
  records[6]["image"] = ["none.png", "006.png"]
  records[13]["image"] = ["013.png", "014.png", "015.png"]
  records[13]["conversations"][0]["value"] = "<image><image><image> Which?"
  limits = {"data.on_bad_record": "skip", "data.max_images": 2}
  expected = ["data/train.json: 2 of 24 records could not be read", "data.max_bad_records = 0.01"]
  fails([*expected, "--write_good"], train, records, **limits)
  with caplog.at_level("WARNING", logger="absl"):
    train(records, **limits, **{"data.max_bad_records": 0.2})
  for part in ("record 3", "record 6", "record 13", "2 bad records are", "1 bad record is"):
    assert part in caplog.text
  assert sft_run.read_metrics(tmp_path / "run")[-1]["step"] == 6  # of 21 records, four each
