"""Compares ranked answers with `encode` of each answer alone, for several kinds of tokenizers."""

import numpy as np
import pytest

from tests.data import test_encode
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.encode import encode
from vlalign_jax.data.encode_preferences import encode_preferences
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Record
from vlalign_jax.data.rows import build_row
from vlalign_jax.errors import InputError

TOKENIZERS = test_encode.TOKENIZERS
PATCHES = 5
CHATML = (  # as in the chat templates of many models
  "{% for m in messages %}{{ '[INST] ' if m.role == 'user' else ' ' }}{{ m.content.strip() }}"
  "{{ ' [/INST]' if m.role == 'user' else ' ' + eos_token }}{% endfor %}"
)
BARE = (  # nothing stands between a question and its answer
  "{% for m in messages %}{{ m.content.strip() }}"
  "{{ '' if m.role == 'user' else eos_token }}{% endfor %}"
)


def make_record(turns, answers) -> Record:
  turns = (*turns[:-1], Turn(turns[-1].human, None))
  images = sum(turn.human.count("<image>") for turn in turns)
  paths = tuple(f"{number}.jpg" for number in range(images))
  return Record("data/train.json", 3, "x", paths, turns, tuple(answers))


def encode_with(tokenizer, turns, answers, template, max_length=100_000, patches=PATCHES):
  image = tokenizer.convert_tokens_to_ids("<image>")
  record = make_record(turns, answers)
  return encode_preferences(record, template, tokenizer, OneTile(image, patches), max_length)


def encode_alone(tokenizer, turns, answer, template, patches=PATCHES):
  """Returns the example that SFT makes of one answer."""
  image = tokenizer.convert_tokens_to_ids("<image>")
  record = make_record(turns, ())
  turns = (*turns[:-1], Turn(turns[-1].human, answer))
  record = Record(record.file, record.index, record.id, record.images, turns)
  return encode(record, template, tokenizer, OneTile(image, patches), 100_000).example


def check(example, alone, earlier_turns):
  """Checks that the prompt and each branch are the example that SFT makes of its answer."""
  assert len(example.answers) == len(alone)
  shared = int(np.sum(example.branches == 0))
  assert not example.branches[:shared].any()
  assert not example.loss_mask[:shared].any()
  assert not example.targets[:shared].any()
  for rank, one in enumerate(alone, start=1):
    mine = np.flatnonzero(example.branches == rank)
    np.testing.assert_array_equal(np.diff(mine), 1)
    np.testing.assert_array_equal(
      np.append(example.tokens[:shared], example.tokens[mine]), one.tokens
    )
    positions = np.append(example.positions[:shared], example.positions[mine])
    np.testing.assert_array_equal(positions, one.positions)
    np.testing.assert_array_equal(example.targets[mine], one.targets[shared:])
    np.testing.assert_array_equal(example.loss_mask[mine], one.loss_mask[shared:])
    if not earlier_turns:
      assert not one.loss_mask[:shared].any()  # the branch has all that SFT learns
    assert example.loss_mask[mine].tolist() == [1] * (len(mine) - 1) + [0]
    assert example.answers[rank - 1] == mine[-1]
  assert example.answers[-1] == len(example.tokens) - 1
  for name in ("tokens", "positions", "branches", "targets", "answers"):
    assert getattr(example, name).dtype == np.int32, name
  assert example.loss_mask.dtype == np.float32


@pytest.mark.parametrize(("template", "name"), test_encode.PAIRS)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_branch_is_the_answer_alone(template, name, turns):
  tokenizer = TOKENIZERS[name]
  answers = ("A cat.", "Two dogs\n and  3", "no", "A catfish")
  encoded = encode_with(tokenizer, test_encode.NORMAL[:turns], answers, template)
  alone = [
    encode_alone(tokenizer, test_encode.NORMAL[:turns], answer, template) for answer in answers
  ]
  assert encoded.kept == (0, 1, 2, 3)
  assert encoded.counts == (4, 0, 0, 0)
  check(encoded.example, alone, turns > 1)
  assert encoded.example.images == ("0.jpg", "1.jpg")[: 1 + turns // 3]
  assert encoded.example.where == 'data/train.json, record 3 ("id": "x")'


@pytest.mark.parametrize(("template", "name"), test_encode.PAIRS)
def test_text_that_is_hard_to_tokenize(template, name):
  tokenizer = TOKENIZERS[name]
  for number, text in enumerate(test_encode.NASTY):
    answers = (text, test_encode.NASTY[number - 1], f"{text} or not")
    turns = (Turn(f"<image>\n{text}", None),)
    alone = [encode_alone(tokenizer, turns, answer, template) for answer in answers]
    check(encode_with(tokenizer, turns, answers, template).example, alone, False)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("chat_template", [CHATML, BARE])
@pytest.mark.parametrize("patches", [1, 4])
def test_the_tokenizers_own_template(name, chat_template, patches):
  tokenizer = TOKENIZERS[name]
  before, tokenizer.chat_template = tokenizer.chat_template, chat_template
  answers = ("A cat.", "two", "A cat. two")
  turns = (Turn("Who?<image>", "me"), Turn("<image><image>", None))
  try:
    encoded = encode_with(tokenizer, turns, answers, "auto", patches=patches)
    alone = [encode_alone(tokenizer, turns, answer, "auto", patches) for answer in answers]
  finally:
    tokenizer.chat_template = before
  check(encoded.example, alone, True)

  image = tokenizer.convert_tokens_to_ids("<image>")
  ends_with_image = bool(encoded.example.tokens[encoded.example.branches == 1][0] == image)
  assert ends_with_image == (chat_template == BARE)
  length = len(encoded.example.tokens)
  row, paths = build_row([encoded.example], length, 3, image, patches)
  assert paths == ("0.jpg", "1.jpg", "2.jpg")
  for rank, one in enumerate(alone, start=1):
    expected, _ = build_row([one], len(one.tokens), 3, image, patches)
    mine = (row["branches"] == 0) | (row["branches"] == rank)
    for key in ("tokens", "positions", "image_slots"):
      np.testing.assert_array_equal(row[key][mine], expected[key], err_msg=key)


def test_answers_equal_or_empty_are_left_out():
  tokenizer = TOKENIZERS["byte_level"]
  turns = test_encode.NORMAL[:1]
  answers = ("A cat.", "  A cat. ", "", "no", "A cat.", "\n \t", "yes")
  encoded = encode_with(tokenizer, turns, answers, "vicuna")
  assert encoded.kept == (0, 3, 6)
  assert encoded.counts == (3, 2, 2, 0)
  alone = [encode_alone(tokenizer, turns, answers[rank], "vicuna") for rank in encoded.kept]
  check(encoded.example, alone, False)


@pytest.mark.parametrize(
  ("answers", "counts"),
  [
    (("A cat.", "A cat. "), (1, 1, 0, 0)),
    (("A cat.", " "), (1, 0, 1, 0)),
    (("", " ", ""), (0, 0, 3, 0)),
    (("a", "a", "a"), (1, 2, 0, 0)),
  ],
)
def test_fewer_than_two_answers_left(answers, counts):
  encoded = encode_with(TOKENIZERS["first"], test_encode.NORMAL[:1], answers, "vicuna")
  assert encoded.example is None
  assert encoded.counts == counts


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_answers_that_do_not_fit_are_left_out_whole(name):
  tokenizer = TOKENIZERS[name]
  turns = test_encode.NORMAL[:2]
  answers = ("yes; it is", "a very, very long answer " * 9, "no", "perhaps, but")
  alone = [encode_alone(tokenizer, turns, answer, "vicuna") for answer in answers]
  full = encode_with(tokenizer, turns, answers, "vicuna").example
  shared = int(np.sum(full.branches == 0))
  sizes = [len(one.tokens) - shared for one in alone]

  def kept(max_length):
    encoded = encode_with(tokenizer, turns, answers, "vicuna", max_length)
    assert encoded.counts == (len(encoded.kept), 0, 0, len(answers) - len(encoded.kept))
    if len(encoded.kept) > 1:
      assert len(encoded.example.tokens) <= max_length
      check(encoded.example, [alone[rank] for rank in encoded.kept], True)
    else:
      assert encoded.example is None
    return encoded.kept

  assert kept(shared + sum(sizes)) == (0, 1, 2, 3)
  assert kept(shared + sum(sizes) - 1) == (0, 1, 2)
  # The long one is too long, not those after it.
  assert kept(shared + sizes[0] + sizes[2] + sizes[3]) == (0, 2, 3)
  assert kept(shared + sizes[0] + sizes[2] + sizes[3] - 1) == (0, 2)
  assert kept(shared + sizes[0] + sizes[2]) == (0, 2)
  assert kept(shared + sizes[0] + sizes[2] - 1) == (0,)
  assert kept(shared) == ()


def test_errors():
  tokenizer = TOKENIZERS["first"]
  record = make_record(test_encode.NORMAL[:1], ("a", "b"))
  with pytest.raises(InputError, match=r"reads <image> as \[\d+\], not as the image token 5; add"):
    encode_preferences(record, "vicuna", tokenizer, OneTile(5, 1), 1000)
  with pytest.raises(InputError, match="is not one of"):
    encode_with(tokenizer, test_encode.NORMAL, ("a", "b"), "alpaca")


@pytest.mark.parametrize(
  ("chat_template", "question", "message"),
  [
    (BARE, "\ufdd0", "the prompt has no token; choose another"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}", "Who?", "be cut"),
  ],
)
def test_chat_templates_that_cannot_be_used(chat_template, question, message):
  tokenizer = TOKENIZERS["first"]
  before, tokenizer.chat_template = tokenizer.chat_template, chat_template
  try:
    with pytest.raises(InputError, match=rf'record 3 \("id": "x"\): .*{message}'):
      encode_with(tokenizer, (Turn(question, None),), ("a", "b"), "auto")
  finally:
    tokenizer.chat_template = before
