"""Tests the ways in which a record names or holds its pictures, and where they stand."""

import base64
import json
import os

import numpy as np
import pytest

from tests import tiny_models
from tests.data.twins import (
  ONE,
  TWO_TURNS,
  assert_equal,
  assistant,
  encoded,
  gpt,
  human,
  llava,
  read,
  text,
  user,
)
from vlalign_jax.data import pictures
from vlalign_jax.data.encode import encode
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Options, load_records
from vlalign_jax.errors import InputError

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
  example = encode(record, "vicuna", tokenizer, OneTile(image_token, 9), 500).example
  assert np.sum(example.tokens == image_token) == 9
  assert "![fig](<image>)" in tokenizer.decode(example.tokens[example.tokens != image_token])


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "b/../../a.png", "", ".."])
def test_the_root_is_not_left(path):
  with pytest.raises(InputError, match="leaves the image root|absolute path|empty path"):
    pictures.below(path, "root")


def test_paths_are_normalized():
  assert pictures.below("./b//c/../a.png", "root") == "b/a.png"
  assert pictures.below("..a.png", "root") == "..a.png"
  assert pictures.below(os.path.abspath("root/b/../a.png"), "root") == "a.png"


def test_where_held_pictures_are_kept_changes_no_digest(directory):
  entry = {**ONE, "image": encoded((directory / "a.png").read_bytes())}
  first = read(directory, entry)
  (directory / "cache").rename(directory / "moved")
  (directory / "train.json").write_text(json.dumps([entry]))
  options = Options(cache=str(directory / "elsewhere"))
  (second,) = load_records(str(directory / "train.json"), options)
  assert first.images != second.images
  assert first.content == second.content
  assert first.content != read(directory, ONE).content
