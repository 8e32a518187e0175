"""Tests what is left out, counted or kept of records by choice."""

import json

import pytest

from tests.data.twins import ONE, encoded, human, llava, read
from vlalign_jax.data.records import Options, load_records
from vlalign_jax.errors import InputError


def test_columns_are_kept_for_reward_functions(directory):
  content = encoded((directory / "a.png").read_bytes())
  entry = {**ONE, "image": content, "solution": "teal", "level": {"of": [1, None]}}
  record = read(directory, entry, keeps_columns=True)
  assert record.columns == {
    **{"image": record.images[0], "conversations": ONE["conversations"]},
    **{"solution": "teal", "level": {"of": [1, None]}},
  }
  assert read(directory, entry).columns is None


def test_keys_that_nothing_reads_are_logged(directory, caplog):
  entry = {**ONE, "source": "web", "license": "MIT", "score": None}
  with caplog.at_level("INFO", logger="absl"):
    read(directory, entry)
  assert "keys that nothing reads: source (1), license (1)" in caplog.text


def test_bad_records_are_left_out_by_choice(directory, caplog):
  path = directory / "train.json"
  path.write_text(json.dumps([ONE] * 3 + [llava(human())]))
  with caplog.at_level("WARNING", logger="absl"):
    records = load_records(str(path), Options(on_bad_record="skip"))
  assert len(records) == 3
  assert "Left out: " in caplog.text
  assert "record 3: conversations[0]: the last question has no answer" in caplog.text
  path.write_text(json.dumps([ONE] * 3 + [llava(human())] * 2))
  with pytest.raises(InputError, match="2 of 5 records could not be read.*writes the others"):
    load_records(str(path), Options(on_bad_record="skip"))
  assert len(load_records(str(path), Options(on_bad_record="skip", max_bad_records=0.5))) == 3
