"""Tests that data files are read piece by piece, each as what it is."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlalign_jax.data import json_entries, picture_store, table_entries
from vlalign_jax.data.entries import entries
from vlalign_jax.errors import InputError

VALUES = [{"a": 'ä😀\\"]}, {[', "b": [1, 2.5e3, None]}, [], "x\n", 12, -3.5, {"c": {"d": True}}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
  monkeypatch.setattr(json_entries, "_CHUNK", chunk)
  path = tmp_path / "a.json"
  path.write_text("\ufeff" + json.dumps(VALUES, ensure_ascii=False, indent=indent) + " \n")
  read = list(json_entries.array(str(path)))
  assert [value for _, _, value in read] == VALUES
  assert [number for number, _, _ in read] == list(range(len(VALUES)))
  assert read[2][1] == "record 2"


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_mistakes_are_placed_whatever_the_pieces(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_entries, "_CHUNK", chunk)
  path = tmp_path / "a.json"
  for text, place in (
    ('[\n {"id": 1},\n {"id": }]', "line 3, column 9"),
    ('[{"ä": 1},\n\n  {"b": "x\n"}]', "line 3, column 11"),
    ('[1, "abc', "line 1, column 5"),
  ):
    path.write_text(text)
    expected = json_error_place(text)
    assert expected == place
    with pytest.raises(InputError, match=f"malformed JSON at {place}"):
      list(json_entries.array(str(path)))
  path.write_bytes('["ä",\n"ä'.encode()[:-1] + b'"]')
  with pytest.raises(InputError, match="line 2 is not UTF-8"):
    list(json_entries.array(str(path)))


def json_error_place(text: str) -> str:
  with pytest.raises(json.JSONDecodeError) as raised:
    json.loads(text)
  return f"line {raised.value.lineno}, column {raised.value.colno}"


def peak(read) -> float:
  """Returns the peak of Python's memory in MB while `read` yields everything."""
  tracemalloc.start()
  for _ in read:
    pass
  size = tracemalloc.get_traced_memory()[1] / 1e6
  tracemalloc.stop()
  return size


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_large_file_is_never_in_memory(tmp_path, name):
  lines = [json.dumps({"image": "A" * 100_000}) for _ in range(400)]  # 40 MB
  path = tmp_path / name
  path.write_text("[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines))
  assert peak(entries(str(path))) < 12


def test_a_single_row_group_is_never_in_memory(tmp_path):
  table = pa.table({"image": [b"%06d" % number * 2000 for number in range(10_000)]})  # 120 MB
  path = str(tmp_path / "a.parquet")
  pq.write_table(table, path, compression="none", use_dictionary=False)
  del table
  pa.default_memory_pool().release_unused()
  before, most = pa.total_allocated_bytes(), 0
  for number, _, row in table_entries.parquet([path]):
    assert row["image"] == b"%06d" % number * 2000
    most = max(most, pa.total_allocated_bytes() - before)
  assert most < 60e6


def test_json_lines_named_json_and_the_other_way(tmp_path):
  path = tmp_path / "lines.json"
  path.write_text('{"a": 1}\n\n{"a": }\n{"a": 2}\n')
  read = list(entries(str(path)))
  assert [(number, place) for number, place, _ in read] == [(n, f"line {n}") for n in (1, 3, 4)]
  assert isinstance(read[1][2], InputError)
  path = tmp_path / "array.jsonl"
  path.write_text('[{"a": 1}, {"a": 2}]')
  assert [value for *_, value in entries(str(path))] == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_not_utf8_is_a_bad_record(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}')
  first, second, third = entries(str(path))
  assert (first[2], third[2]) == ({"a": 1}, {"a": 2})
  assert str(second[2]) == f"{path}, line 2: is not UTF-8; convert the file to UTF-8"


def write_splits(directory):
  for split in ("train", "test"):
    pq.write_table(pa.table({"a": [1]}), directory / f"{split}-00000-of-00001.parquet")


def write_dataset_dict(directory):
  (directory / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (write_splits, r"holds the splits test, train; name the files of one, such as .*train-\*"),
    (write_dataset_dict, "holds the splits train, test; name the directory of one"),
    (lambda directory: (directory / "state.json").write_text("{"), "state.json cannot be read"),
    (lambda directory: None, "holds neither .*parquet nor a saved data set"),
  ],
)
def test_directories_that_cannot_be_read(tmp_path, write, message):
  write(tmp_path)
  with pytest.raises(InputError, match=message):
    list(entries(str(tmp_path)))


def test_a_damaged_table_is_named(tmp_path):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"a": list(range(1000))}), path)
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(
    InputError, match=r"a.parquet: row 0: cannot be read \(.*\); replace the file"
  ):
    list(entries(str(path)))


def test_a_store_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="data.cache .*cannot be written.*name another directory"):
    picture_store.store(str(tmp_path / "file")).keep(b"picture")


def test_the_store_is_in_the_user_s_cache_by_default(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  path = picture_store.store("").keep(b"\xff\xd8\xff picture")
  assert path.startswith(f"{tmp_path}/vlalign_jax/pictures/")
  assert path.endswith(".jpg")
  assert picture_store.store("").keep(b"\xff\xd8\xff picture") == path
