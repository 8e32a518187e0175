"""Tests that rows of Parquet files and saved data sets are read as LLaVA's records."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.twins import (
  IMAGE,
  ONE,
  assert_equal,
  assistant,
  gpt,
  human,
  llava,
  read,
  text,
  user,
)
from vlalign_jax.data.encode import encode
from vlalign_jax.data.records import Options, load_records


def rows(content: bytes) -> list[dict]:
  """Returns rows of a table, with pictures as bytes, and the same records in LLaVA's shape."""
  return [
    {
      "images": [{"bytes": content, "path": "x.png"}],
      "messages": [user([IMAGE | {"text": None}, text("What?")]), assistant([text("teal")])],
      "system": None,
      "source": "drawn",
    },
    {
      "images": [],
      "messages": [user([text("Who?")]), assistant([text("me")])],
      "system": "Be brief.",
      "source": None,
    },
    {
      "images": [{"bytes": None, "path": "b.png"}],
      "messages": [user([text("What?")]), assistant([text("rust")])],
      "system": None,
      "source": None,
    },
  ]


TWINS = [
  ONE,
  {"conversations": [human("Who?"), gpt("me")], "system": "Be brief."},
  llava(human("What?"), gpt("rust"), image="b.png"),
]


def save_parquet(directory, table):
  pq.write_table(table, directory / "train.bin", row_group_size=2)  # told by content
  return directory / "train.bin"


def save_shards(directory, table):
  (directory / "shards").mkdir()
  for number in range(2):
    part = table.slice(2 * number, 2)
    pq.write_table(part, directory / "shards" / f"train-0000{number}-of-00002.parquet")
  return directory / "shards"


def save_pattern(directory, table):
  pq.write_table(table, save_shards(directory, table) / "test-00000-of-00001.parquet")
  return directory / "shards" / "train-*.parquet"


def save_dataset(directory, table):
  datasets.Dataset(table).save_to_disk(directory / "saved", num_shards=2)
  return directory / "saved"


@pytest.mark.parametrize("save", [save_parquet, save_shards, save_pattern, save_dataset])
def test_tables(directory, save):
  table = pa.Table.from_pylist(rows((directory / "a.png").read_bytes()))
  path = str(save(directory, table))
  records = load_records(path, Options(str(directory), cache=str(directory / "cache")))
  assert [record.index for record in records] == [0, 1, 2]
  for record, twin in zip(records, TWINS, strict=True):
    assert_equal(record, read(directory, twin), encode)
  kept = [file for file in (directory / "cache").rglob("*") if file.is_file()]
  assert [file.read_bytes() for file in kept] == [(directory / "a.png").read_bytes()]
  last = "train-00001-of-00002.parquet, row 0" if "shards" in path else "row 2"
  if "saved" not in path:
    assert records[2].where == f"{path}, {last}"


def test_a_binary_column(directory):
  content = (directory / "a.png").read_bytes()
  table = pa.Table.from_pylist([{"image": content, "prompt": "What?", "completion": "teal"}])
  pq.write_table(table, directory / "train.parquet")
  options = Options(cache=str(directory / "cache"))
  (record,) = load_records(str(directory / "train.parquet"), options)
  assert_equal(record, read(directory, ONE), encode)
