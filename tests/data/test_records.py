"""Tests how LLaVA JSON and JSON lines are read, and the error of every kind of bad record."""

import json
import pickle

import pytest

from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.records import Options, Record, load_records, scan_records
from vlalign_jax.errors import InputError


def human(value="what?"):
  return {"from": "human", "value": value}


def gpt(value="that"):
  return {"from": "gpt", "value": value}


def record(**fields):
  return {"id": "7", "conversations": [human(), gpt()], **fields}


@pytest.fixture
def write(tmp_path):
  """Writes records (or text, or bytes) to a file next to images a.png and sub/b.png."""
  (tmp_path / "sub").mkdir()
  (tmp_path / "a.png").touch()
  (tmp_path / "sub" / "b.png").touch()

  def to_file(content, name="train.json"):
    path = tmp_path / name
    if not isinstance(content, (str, bytes)):
      content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)

  return to_file


def test_reads_turns_images_and_ids(write):
  path = write(
    [
      record(id="000123", image="a.png", conversations=[human("<image>\nwhat?"), gpt()]),
      record(
        image=["a.png", "sub/../sub/b.png"],
        conversations=[
          {"from": "user", "value": "<image> or"},
          {"from": "assistant", "value": " yes "},
          human("<image>"),
          gpt("no"),
        ],
      ),
      record(id=5, image=None),
      {"conversations": [human("Ä 😀"), gpt()], "image": []},
    ]
  )
  records = load_records(path)
  assert records == [
    Record(path, 0, "000123", ("a.png",), (Turn("<image>\nwhat?", "that"),)),
    Record(
      path, 1, "7", ("a.png", "sub/b.png"), (Turn("<image> or", " yes "), Turn("<image>", "no"))
    ),
    Record(path, 2, "5", (), (Turn("what?", "that"),)),
    Record(path, 3, "3", (), (Turn("Ä 😀", "that"),)),
  ]
  assert records[0].where == f'{path}, record 0 ("id": "000123")'
  assert records[3].where == f"{path}, record 3"  # it has no id
  assert pickle.loads(pickle.dumps(records)) == records


def test_images_without_placeholder_come_first(write):
  path = write(
    [record(image=["a.png", "sub/b.png"], conversations=[human(""), gpt(), human("b"), gpt()])]
  )
  turns = load_records(path)[0].turns
  assert turns == (Turn("<image>\n<image>\n", "that"), Turn("b", "that"))


def test_last_answer_may_be_absent_only_where_allowed(write):
  path = write([record(conversations=[human("a"), gpt("b"), human("c")])])
  (record_read,) = load_records(path, Options(answers="optional"))
  assert record_read.turns == (Turn("a", "b"), Turn("c", None))
  with pytest.raises(InputError, match=r"conversations\[2\]: the last question has no answer"):
    load_records(path)


@pytest.mark.parametrize("name", ["train.jsonl", "TRAIN.NDJSON"])
def test_json_lines(write, name):
  lines = [json.dumps(record(id="x\u2028y"), ensure_ascii=False), "", json.dumps(record())]
  path = write(b"\xef\xbb\xbf" + "\r\n".join([*lines, '{"id": }', "  "]).encode(), name)
  records, errors, _ = scan_records(path)
  assert [(one.index, one.id) for one in records] == [(1, "x\u2028y"), (3, "7")]
  assert records[1].where == f'{path}, line 3 ("id": "7")'
  assert [str(error) for error in errors] == [
    f"{path}, line 4: malformed JSON at column 8 (Expecting value); fix it"
  ]


@pytest.mark.parametrize(
  ("content", "name", "message"),
  [
    ("", "a.json", "is empty"),
    (b"\xef\xbb\xbf \n", "a.jsonl", "is empty"),
    ("[]", "a.json", "list of records is empty"),
    ("{}", "a.json", "holds an object, not a list"),
    ('{"data": [1], "info": 2}', "a.json", "an object with the keys data, info, not a list"),
    ('{\n "id": 1,\n "x": 2}', "a.json", "holds an object, not a list"),
    ("[1, 2", "a.json", "malformed JSON at line 1, column 6"),
    ("[1 2]", "a.json", r"line 1, column 4 \(Expecting ',' delimiter\)"),
    ("[1, 2] 3", "a.json", r"column 8 \(Extra data\)"),
    ("null", "a.json", "is neither JSON, nor JSON lines, nor Parquet"),
    (b"\x1f\x8b\x08\x00", "a.jsonl.gz", "compressed"),
    ('[\n {"id": 1},\n {"id": }]', "a.json", "malformed JSON at line 3, column 9"),
    ("[" * 100_000, "a.json", "malformed JSON"),
    (b'[\n"\xff"]', "a.json", "line 2 is not UTF-8"),
  ],
)
def test_unusable_files_raise_at_once(write, content, name, message):
  path = write(content, name)
  with pytest.raises(InputError, match=message) as raised:
    scan_records(path)
  assert str(raised.value).startswith(path)
  assert "\n" not in str(raised.value)


def test_missing_file_directory_and_image_root(write, tmp_path):
  with pytest.raises(InputError, match="no such file"):
    scan_records(str(tmp_path / "none.json"))
  with pytest.raises(InputError, match="holds neither .*parquet nor a saved data set"):
    scan_records(str(tmp_path))
  with pytest.raises(InputError, match="no such directory; set data.images"):
    scan_records(write([record(image="a.png")]), Options(str(tmp_path / "coco")))
  assert scan_records(write([record()]), Options(str(tmp_path / "coco"))).errors == []


IMAGE = {"image": "a.png"}
BAD = [
  (3, "is a number, not an object"),
  (None, "is null, not an object"),
  ({"id": "7"}, '"conversations" is missing'),
  (record(conversations=[]), '"conversations" is empty'),
  (record(conversations="hi"), '"conversations" is text'),
  (record(conversations=["hi"]), r"conversations\[0\] is text"),
  (record(conversations=[gpt(), human()]), r'conversations\[0\]: "from" is "gpt" where "human"'),
  (record(conversations=[human(), human()]), r'conversations\[1\]: "from" is "human" where "gpt"'),
  (
    record(conversations=[{"from": "system", "value": "x"}]),
    "the system's message is the only one",
  ),
  (record(conversations=[{"value": "x"}]), '"from" is null'),
  (record(conversations=[{"from": ["human"], "value": "x"}]), "human and gpt take turns"),
  (record(conversations=[human(3), gpt()]), r'conversations\[0\]: "value" is a number'),
  (
    record(conversations=[human(), gpt(["a", "b"])]),
    r"\[1\]: a list of answers, best first, is",
  ),
  (record(conversations=[human(), {"from": "gpt"}]), '"value" is null'),
  (record(conversations=[human(" \n"), gpt()]), r"conversations\[0\]: the question is empty"),
  (
    record(**IMAGE, conversations=[human(), gpt(), human(""), gpt()]),
    r"conversations\[2\]: the question is empty",
  ),
  (record(conversations=[human(), gpt(" \t")]), "the answer is empty"),
  (record(conversations=[human()]), "the last question has no answer"),
  (record(conversations=[human("<image>"), gpt()]), "hold 1 <image> but it has 0 images"),
  (
    record(**IMAGE, conversations=[human("<image><image>"), gpt()]),
    "2 <image> but it has 1 image;",
  ),
  (record(image=["a.png", 3]), '"image" holds a number'),
  (record(image={"name": "a.png"}), 'an object without "bytes" and "path"'),
  (record(image=[None]), '"image" holds null; give a path'),
  (record(image="https://example.org/a.png"), "is a URL, and pictures must be local: download"),
  (record(image="data:image/png,xyz"), '"image" holds a data URI without ;base64'),
  (record(image="data:image/png;base64,x"), '"image" holds a damaged data URI'),
  (record(image={"bytes": "iVBORw0K"}), "text that is not a picture in base64"),
  (record(image="sub\\b.png"), "not found under .*; write / between directories"),
  (record(video="a.mp4"), 'has "video"; only pictures can be learned from'),
  (record(videos=["a.mp4"]), 'has "videos"'),
  (record(audio="a.wav"), 'has "audio"'),
  (record(messages=[]), 'has "conversations" and "messages"; keep one'),
  (record(system="a", system_prompt="b"), "several system texts that differ"),
  (record(system=3), '"system" is a number'),
  (record(image="a.png", images=["a.png"]), 'has "image" and "images"; keep one'),
  (record(image=""), "empty path"),
  (record(image="/a.png"), 'image "/a.png" is an absolute path outside of data.images'),
  (record(image="../a.png"), 'image "../a.png" leaves the image root'),
  (record(image="sub/../../a.png"), "leaves the image root"),
  (
    record(image="none.png"),
    'image "none.png" not found under .*; put it there or set data.images',
  ),
  (record(image="sub"), 'image "sub" not found'),
  (record(image="a\0.png"), "not found"),
  (record(id=["7"]), '"id" is a list'),
  (record(conversations=[human("\ud800"), gpt()]), "half a surrogate pair"),
]


@pytest.mark.parametrize(("entry", "message"), BAD)
def test_a_bad_record_is_named(write, entry, message):
  path = write([record(), entry])
  records, errors, _ = scan_records(path)
  assert [record.index for record in records] == [0]
  (error,) = errors
  with pytest.raises(InputError, match=message):
    raise error
  shown = ' ("id": "7")' if isinstance(entry, dict) and entry["id"] == "7" else ""
  assert str(error).startswith(f"{path}, record 1{shown}: ")
  assert "\n" not in str(error)
  str(error).encode()  # printable whatever is in the record


def test_errors_keep_the_order_of_the_file(write):
  path = write([record(image="x.png"), 1, record(), record(image="y.png")])
  records, errors, _ = scan_records(path)
  assert [record.index for record in records] == [2]
  assert [str(error).split(",")[1][:9] for error in errors] == [
    " record 0",
    " record 1",
    " record 3",
  ]


@pytest.mark.parametrize(
  ("bad", "ending"),
  [
    (1, "set data.images"),
    (2, "; 1 more record is bad: scripts/check_data.py lists them all"),
    (4, "; 3 more records are bad: scripts/check_data.py lists them all"),
  ],
)
def test_load_names_the_first_bad_record_and_counts_the_rest(write, bad, ending):
  path = write([record()] + [record(image=f"{number}.png") for number in range(bad)])
  with pytest.raises(InputError, match='record 1 .* image "0.png" not found') as raised:
    load_records(path)
  assert str(raised.value).endswith(ending)


def test_images_are_below_the_given_root(write, tmp_path):
  path = write([record(image="b.png")])
  assert load_records(path, Options(str(tmp_path / "sub")))[0].images == ("b.png",)
  assert len(scan_records(path).errors) == 1


def test_each_distinct_image_is_looked_for_once(write, monkeypatch):
  looked_for = []
  monkeypatch.setattr("os.path.isfile", lambda path: looked_for.append(path) or True)
  assert len(load_records(write([record(image=["a.png", "./a.png"])] * 50))) == 50
  assert len(looked_for) == 1
