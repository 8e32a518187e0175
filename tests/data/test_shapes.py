"""Tests that a record in any shape is read as the same record in LLaVA's own shape."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import tiny_models
from vlalign_jax.data.encode import encode
from vlalign_jax.data.encode_preferences import encode_preferences
from vlalign_jax.data.images import open_image
from vlalign_jax.data.records import Options, load_records
from vlalign_jax.errors import InputError


def human(value="<image>\nWhat?"):
  return {"from": "human", "value": value}


def gpt(value="teal"):
  return {"from": "gpt", "value": value}


def user(content="<image>\nWhat?"):
  return {"role": "user", "content": content}


def assistant(content="teal"):
  return {"role": "assistant", "content": content}


def text(words):
  return {"type": "text", "text": words}


SYSTEM = {"role": "system", "content": "Be brief."}
IMAGE = {"type": "image"}


def llava(*messages, image="a.png", **fields):
  """Returns a record in LLaVA's shape; without messages a question and its answer."""
  return {"image": image, "conversations": list(messages or (human(), gpt())), **fields}


ONE, PAIR = llava(), llava(human(), gpt(["teal", "rust"]))
TWO_TURNS = llava(human(), gpt(), human("Bright?"), gpt("no"))
PICTURE = {"image": "a.png"}

# Shape -> (record, the same record in LLaVA's shape).
SINGLE = {
  "roles of users in conversations": (
    llava({"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "teal"}),
    ONE,
  ),
  "role and content in conversations": (llava(user(), assistant()), ONE),
  "messages of text": ({**PICTURE, "messages": [user(), assistant()]}, ONE),
  "messages of parts": (
    {"images": ["a.png"], "messages": [user([IMAGE, text("What?")]), assistant([text("teal")])]},
    ONE,
  ),
  "the picture after the text": (
    {
      "images": ["a.png"],
      "messages": [
        user([{"type": "text", "index": None, "text": "What?"}, {"type": "image", "index": 0}]),
        assistant(),
      ],
    },
    ONE,
  ),
  "image_url with a path": (
    {
      "messages": [
        user([{"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")]),
        assistant(),
      ]
    },
    ONE,
  ),
  "a part's own picture beside the record's": (
    {
      "images": ["a.png"],
      "messages": [user([IMAGE, {"type": "image", "path": "b.png"}, text("Same?")]), assistant()],
    },
    llava(human("<image>\n<image>\nSame?"), gpt(), image=["a.png", "b.png"]),
  ),
  "prompt and completion of text": (
    {**PICTURE, "prompt": "<image>\nWhat?", "completion": "teal"},
    ONE,
  ),
  "prompt and completion of messages": (
    {"images": ["a.png"], "prompt": [user([IMAGE, text("What?")])], "completion": [assistant()]},
    ONE,
  ),
  "completion of several turns": (
    {**PICTURE, "prompt": [user()], "completion": [assistant(), user("Bright?"), assistant("no")]},
    TWO_TURNS,
  ),
  "instruction, input, output": (
    {**PICTURE, "instruction": "<image>Name it.", "input": "In a word.", "output": "teal"},
    llava(human("<image>Name it.\nIn a word."), gpt()),
  ),
  "instruction with history": (
    {
      **PICTURE,
      "instruction": "Bright?",
      "input": "",
      "output": "no",
      "history": [["<image>\nWhat?", "teal"]],
    },
    TWO_TURNS,
  ),
  "conversations as JSON text": (
    {**PICTURE, "conversations": json.dumps([human(), gpt()])},
    ONE,
  ),
  "conversations as an object of lists": (
    {
      **PICTURE,
      "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "teal"]},
    },
    ONE,
  ),
  "image_path": ({"image_path": "a.png", "conversations": [human("What?"), gpt()]}, ONE),
  "a first message of the system": (
    llava({"from": "system", "value": "Be brief."}, human(), gpt()),
    llava(system="Be brief."),
  ),
  "the system's role": (
    {**PICTURE, "messages": [SYSTEM, user(), assistant()]},
    llava(system="Be brief."),
  ),
  "system_prompt": (llava(system_prompt=" Be brief.\n"), llava(system="Be brief.")),
  "the system's message in a prompt": (
    {**PICTURE, "prompt": [SYSTEM, user()], "completion": [assistant()]},
    llava(system="Be brief."),
  ),
}
RANKED = {
  "prompt, chosen and rejected of text": (
    {**PICTURE, "prompt": "<image>\nWhat?", "chosen": "teal", "rejected": "rust"},
    PAIR,
  ),
  "prompt, chosen and rejected of messages": (
    {
      "images": ["a.png"],
      "prompt": [SYSTEM, user([IMAGE, text("What?")])],
      "chosen": [assistant([text("teal")])],
      "rejected": [assistant([text("rust")])],
    },
    PAIR | {"system": "Be brief."},
  ),
  "implicit prompt": (
    {
      **PICTURE,
      "chosen": [user(), assistant("teal")],
      "rejected": [user(), assistant("rust")],
    },
    PAIR,
  ),
  "conversations, chosen and rejected": (
    {
      "images": ["a.png"],
      "conversations": [human()],
      "chosen": gpt("teal"),
      "rejected": gpt("rust"),
    },
    PAIR,
  ),
  "messages, chosen and rejected": (
    {**PICTURE, "messages": [SYSTEM, user()], "chosen": "teal", "rejected": assistant("rust")},
    PAIR | {"system": "Be brief."},
  ),
  "instruction, chosen and rejected": (
    {**PICTURE, "instruction": "<image>\nWhat?", "chosen": "teal", "rejected": "rust"},
    PAIR,
  ),
  "instruction with a list of outputs": (
    {**PICTURE, "instruction": "<image>\nWhat?", "output": ["teal", "rust"]},
    PAIR,
  ),
  "RLAIF-V": (
    {"image_path": "a.png", "question": "What?", "chosen": "teal", "rejected": "rust"},
    PAIR,
  ),
  "LLaVA-Human-Preference-10K": (
    llava(human(), gpt("?"), output_1=gpt("rust"), output_2={"from": "llava", "value": "teal"})
    | {"preference": 2},
    PAIR,
  ),
  "vision-feedback-mix": (
    {
      **PICTURE,
      "conversations": json.dumps(
        [human(), {"from": "gpt", "preference_values": ["teal", "rust"]}]
      ),
    },
    PAIR,
  ),
}


@pytest.fixture
def directory(tmp_path):
  """Returns a directory with the pictures a.png and b.png."""
  for name, color in (("a.png", (0, 120, 120)), ("b.png", (180, 60, 10))):
    Image.new("RGB", (20, 20), color).save(tmp_path / name)
  return tmp_path


def read(directory, entry, answers="one", name="train.json", **options):
  (directory / name).write_text(json.dumps([entry]))
  (record,) = load_records(
    str(directory / name), Options("", answers, cache=str(directory / "cache"), **options)
  )
  return record


def assert_equal(record, twin, encoder):
  """Compares what a model gets of two records: tokens and pictures."""
  assert (record.answers, record.system) == (twin.answers, twin.system)
  tokenizer = tiny_models.make_tokenizer()
  image_token = tokenizer.convert_tokens_to_ids("<image>")
  mine, theirs = (
    encoder(one, "vicuna", tokenizer, image_token, 9, 500).example for one in (record, twin)
  )
  for name in ("tokens", "positions", "branches", "targets", "loss_mask", "answers"):
    np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
  assert np.sum(mine.loss_mask)
  for one, other in zip(record.image_files, twin.image_files, strict=True):
    np.testing.assert_array_equal(np.asarray(open_image(one)), np.asarray(open_image(other)))


@pytest.mark.parametrize("shape", SINGLE)
def test_single_answers(directory, shape):
  entry, twin = SINGLE[shape]
  record, expected = read(directory, entry), read(directory, twin)
  assert_equal(record, expected, encode)


@pytest.mark.parametrize("shape", RANKED)
def test_ranked_answers(directory, shape):
  entry, twin = RANKED[shape]
  for answers in ("ranked", "optional"):
    record, expected = read(directory, entry, answers), read(directory, twin, answers)
    assert_equal(record, expected, encode_preferences)


def encoded(content: bytes) -> str:
  return base64.b64encode(content).decode()


# How a record may name its picture: (directory, the picture's bytes) -> value.
PICTURES = {
  "a relative path": lambda directory, content: "./a.png",
  "an absolute path": lambda directory, content: str(directory / "a.png"),
  "a file URI": lambda directory, content: f"file://{directory}/a.png",
  "base64": lambda directory, content: encoded(content),
  "base64 on several lines": lambda directory, content: base64.encodebytes(content).decode(),
  "a data URI": lambda directory, content: f"data:image/png;base64,{encoded(content)}",
  "an object with a path": lambda directory, content: {"bytes": None, "path": "a.png"},
  "an object with base64": lambda directory, content: {"bytes": encoded(content), "path": "x"},
}


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize("form", PICTURES)
def test_pictures(directory, form, in_list):
  value = PICTURES[form](directory, (directory / "a.png").read_bytes())
  record = read(directory, {**ONE, "image": [value] if in_list else value})
  assert_equal(record, read(directory, ONE), encode)
  part = {"type": "image", "image": value}
  parts = {"messages": [user([part, text("What?")]), assistant()]}
  assert_equal(read(directory, parts), read(directory, ONE), encode)


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
  datasets = pytest.importorskip("datasets")
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


def test_placeholders_first(directory):
  """As the original does: taken out and put before the first question."""
  entry = llava(human(), gpt(), human("<image>\nBright?<image>"), gpt("no"))
  assert_equal(read(directory, entry, placeholders="first"), read(directory, TWO_TURNS), encode)
  stray = {"conversations": [human("<image>\nWhat?"), gpt()]}
  plain = {"conversations": [human("What?"), gpt()]}
  assert_equal(read(directory, stray, placeholders="first"), read(directory, plain), encode)
  matching = llava(human("Who?"), gpt("me"), human("<image>What?"), gpt())
  moved = read(directory, matching, placeholders="first")
  assert_equal(moved, read(directory, matching), encode)  # nothing to move


def test_the_image_word_in_an_answer_is_plain(directory):
  entry = llava(human(), gpt("![fig](<image>)"))
  record = read(directory, entry)
  assert record.turns[0].gpt == "![fig](<image>)"
  tokenizer = tiny_models.make_tokenizer()
  image_token = tokenizer.convert_tokens_to_ids("<image>")
  example = encode(record, "vicuna", tokenizer, image_token, 9, 500).example
  assert np.sum(example.tokens == image_token) == 9
  assert "![fig](<image>)" in tokenizer.decode(example.tokens[example.tokens != image_token])


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
