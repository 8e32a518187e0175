"""Compares encoding with tokenizing and decoding complete texts, for several tokenizers."""

import numpy as np
import pytest
from tokenizers import AddedToken, processors
from transformers import ByT5Tokenizer

from tests.data.tokenizers import byte_level_tokenizer, sentencepiece_style_tokenizer
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.encode import Example, encode
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Record
from vlalign_jax.data.templates import render, turn_pieces
from vlalign_jax.errors import InputError

TOKENIZERS = {
  "byte_level": byte_level_tokenizer(),
  "legacy": sentencepiece_style_tokenizer(legacy=True),
  "first": sentencepiece_style_tokenizer(legacy=False),
}
PAIRS = [
  (template, name)
  for name in TOKENIZERS
  for template in ("default", "llama_2", "llama_3", "vicuna", "llava")
  if template != "llama_3" or name == "byte_level"
]
LEADING_SPACE = {"default": "", "llama_2": " ", "llama_3": "", "vicuna": " ", "llava": " "}

NORMAL = (
  Turn("<image>\nWhat is in the image?", "A cat and two dogs, 12 in all."),
  Turn("Is it 'quoted'?", "Yes; it is.\nThere are\n\n  more lines."),
  Turn("And here?\n<image>", "Café, naïve."),
)

NASTY = [
  "\n\nleading newlines",
  "  leading and  inner   spaces  ",
  "\tdef main():\n    return  1\n\n\n\tx",
  "🙂 and 👍🏽",
  "👩‍👩‍👧",
  "猫がいる。",
  "。猫",
  "\u0301combining mark first",
  "\u200bzero width first",
  ": colon",
  "...",
  ")",
  "]",
  "[/INST]",
  "'s merged",
  '"quoted"',
  "1234567",
  "a",
  "ISTANT: A cat.",
  "user",
  "<",
  "</",
  "/s>",
  "|>",
  "<|",
  "<0x41>",
  "Ġ\u0120Ċ",
  "ﬁ ligature ① full－width",
  "\r\nwindows\r\nlines",
  "\x00 and \x7f",
]


def make_record(turns) -> Record:
  images = sum(turn.human.count("<image>") for turn in turns)
  return Record("data/train.json", 3, "x", tuple(f"{n}.jpg" for n in range(images)), tuple(turns))


def encode_with(tokenizer, turns, template, tokens_per_image=1, max_length=100_000):
  image_token_id = tokenizer.convert_tokens_to_ids("<image>")
  record = make_record(turns)
  layout = OneTile(image_token_id, tokens_per_image)
  return encode(record, template, tokenizer, layout, max_length)


def learned_texts(example: Example, tokenizer) -> list[str]:
  """Returns the text of every learned stretch: the example decoded to its end, less its start."""
  learned = np.concatenate([[0], example.loss_mask[:-1]]).astype(int)
  edges = np.flatnonzero(np.diff([0, *learned, 0]))
  texts = []
  for start, end in edges.reshape(-1, 2):
    before = tokenizer.decode(example.tokens[:start])
    texts.append(tokenizer.decode(example.tokens[:end]).removeprefix(before))
  return texts


def check_shift(example: Example) -> None:
  learned = example.loss_mask == 1
  assert np.array_equal(example.targets[:-1][learned[:-1]], example.tokens[1:][learned[:-1]])
  assert not example.targets[~learned].any()
  assert set(np.unique(example.loss_mask)) <= {0, 1}
  assert example.loss_mask[-1] == 0
  assert np.array_equal(example.positions, np.arange(len(example.tokens)))
  assert not example.branches.any()
  for name in ("tokens", "positions", "branches", "targets"):
    assert getattr(example, name).dtype == np.int32
  assert example.loss_mask.dtype == np.float32


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_example_written_out(name):
  tokenizer = TOKENIZERS[name]
  turns = (Turn("<image><image> What is it?", "A cat."),)
  example = encode_with(tokenizer, turns, "plain", tokens_per_image=3).example
  newline = {"byte_level": ["Ċ"], "legacy": ["▁", "<0x0A>"], "first": ["<0x0A>"]}[name]
  tokens = tokenizer.convert_ids_to_tokens(example.tokens)
  assert tokens == [
    tokenizer.bos_token,
    *["<image>"] * 3,
    *newline,
    *["<image>"] * 3,
    *newline,
    *tokens[-4:-1],
    tokenizer.eos_token,
  ]
  assert [token.replace("Ġ", "▁") for token in tokens[-4:-1]] == ["A", "▁cat", "."]
  assert example.loss_mask.tolist() == [0] * (len(tokens) - 5) + [1, 1, 1, 1, 0]
  assert example.targets[-5:].tolist() == [*example.tokens[-4:], 0]
  assert example.images == ("0.jpg", "1.jpg")
  assert example.where == 'data/train.json, record 3 ("id": "x")'
  check_shift(example)


@pytest.mark.parametrize(("template", "name"), PAIRS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_tokenizing_the_complete_text(template, name, count):
  tokenizer = TOKENIZERS[name]
  turns = NORMAL[:count]
  pieces = render(turns, template, tokenizer, "here")
  expected = tokenizer("".join(piece.text for piece in pieces))["input_ids"]
  encoded = encode_with(tokenizer, turns, template)
  assert encoded.example.tokens.tolist() == expected
  assert encoded.counts == (0,)
  assert learned_texts(encoded.example, tokenizer) == [
    piece.text for piece in pieces if piece.learn
  ]
  check_shift(encoded.example)


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_mask_never_drifts(template, name):
  tokenizer = TOKENIZERS[name]
  eos = tokenizer.eos_token
  end = "<|eot_id|>" if template == "llama_3" else eos
  for number, text in enumerate(NASTY):
    other = NASTY[number - 1]
    turns = (Turn(f"<image>\n{text}", other), Turn(other, text))
    example = encode_with(tokenizer, turns, template, tokens_per_image=5).example
    space = LEADING_SPACE[template]
    last = space + text.strip() + end + (eos if end != eos else "")
    assert learned_texts(example, tokenizer) == [space + other.strip() + end, last]
    check_shift(example)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert np.count_nonzero(example.tokens == image) == 5
    assert not np.any((example.targets == image) & (example.loss_mask == 1))
    # What the model reads before its first answer is what it reads when asked for one.
    prompt = turn_pieces(turns[:1], template, tokenizer, "here")[0].text
    ids = tokenizer(prompt)["input_ids"]
    one = encode_with(tokenizer, turns[:1], template).example
    assert one.tokens[: len(ids)].tolist() == ids
    assert np.flatnonzero(one.loss_mask)[0] == len(ids) - 1


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_turns_that_do_not_fit_are_dropped_whole(template, name):
  tokenizer = TOKENIZERS[name]
  parts = [encode_with(tokenizer, NORMAL[:n], template, 7).example for n in (1, 2, 3)]
  lengths = [len(part.tokens) for part in parts]
  for kept, (part, length) in enumerate(zip(parts, lengths, strict=True), start=1):
    too_long = [*lengths, 100_000][kept] - 1
    for max_length in (length, too_long):
      encoded = encode_with(tokenizer, NORMAL, template, 7, max_length)
      assert encoded.counts == (3 - kept,)
      assert np.array_equal(encoded.example.tokens, part.tokens)
      assert np.array_equal(encoded.example.loss_mask, part.loss_mask)
      assert np.array_equal(encoded.example.targets, part.targets)
      assert encoded.example.images == part.images == ("0.jpg", "1.jpg")[: 1 + kept // 3]
      assert encoded.example.tokens[-1] == tokenizer.eos_token_id
      assert encoded.example.loss_mask[-2] == 1
  nothing = encode_with(tokenizer, NORMAL, template, 7, lengths[0] - 1)
  assert nothing.example is None
  assert nothing.counts == (3,)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_users_control_words_stay_words(name):
  tokenizer = TOKENIZERS[name]
  words = [token for token in tokenizer.get_added_vocab() if token != "<image>"]
  text = "".join(words) + " as in " + " ".join(words)
  turns = (
    Turn(f"<image>\nWrite {text}.", f"{text} and <image>"),
    Turn(f"{text}<im<image>age>", f"No {text}"),
  )
  example = encode_with(tokenizer, turns, "vicuna").example
  ids = example.tokens.tolist()
  image, bos, eos = (
    tokenizer.convert_tokens_to_ids(token)
    for token in ("<image>", tokenizer.bos_token, tokenizer.eos_token)
  )
  special = [index for index in ids if index in tokenizer.all_special_ids or index == image]
  assert special == [bos, image, eos, image, eos]
  assert learned_texts(example, tokenizer) == [
    f" {text} and <image>{tokenizer.eos_token}",
    f" No {text}{tokenizer.eos_token}",
  ]
  assert f"Write {text}. ASSISTANT:" in tokenizer.decode(ids)
  assert f"USER: <image>{'' if name == 'first' else ' ' * (name == 'legacy')}\n{text}<image>" in (
    tokenizer.decode(ids)
  )


def test_auto_does_not_double_the_bos():
  tokenizer = sentencepiece_style_tokenizer(legacy=False)
  tokenizer.chat_template = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
  )
  example = encode_with(tokenizer, NORMAL, "auto").example
  messages = []
  for turn in NORMAL:
    placeholder = "<image>\n" * turn.human.count("<image>")
    question = placeholder + turn.human.replace("<image>", "").strip()
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": turn.gpt})
  expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
  assert example.tokens.tolist() == expected
  assert learned_texts(example, tokenizer) == [f" {turn.gpt} </s>" for turn in NORMAL]
  check_shift(example)


def test_tokenizers_own_settings_do_not_cut_or_close_the_text():
  plain, tokenizer = TOKENIZERS["first"], sentencepiece_style_tokenizer(legacy=False)
  backend = tokenizer.backend_tokenizer
  backend.enable_truncation(max_length=8)
  backend.enable_padding(length=300)
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  expected = encode_with(plain, NORMAL, "vicuna").example
  assert np.array_equal(encode_with(tokenizer, NORMAL, "vicuna").example.tokens, expected.tokens)


def test_no_bos_where_the_tokenizer_adds_none():
  tokenizer = byte_level_tokenizer()
  tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
  example = encode_with(tokenizer, NORMAL, "vicuna").example
  expected = encode_with(TOKENIZERS["byte_level"], NORMAL, "vicuna").example
  assert np.array_equal(example.tokens, expected.tokens[1:])


def test_tokens_added_later_are_seen():
  tokenizer = byte_level_tokenizer()
  turns = (Turn("<image>\nSay <stop>", "<stop>"),)
  before = encode_with(tokenizer, turns, "vicuna").example
  tokenizer.add_tokens([AddedToken("<stop>", special=True)], special_tokens=True)
  after = encode_with(tokenizer, turns, "vicuna").example
  assert learned_texts(before, tokenizer) == learned_texts(after, tokenizer)
  assert tokenizer.convert_tokens_to_ids("<stop>") not in after.tokens


def test_users_may_write_added_tokens_that_are_not_special():
  tokenizer = byte_level_tokenizer()
  tokenizer.add_tokens(["<think>"])
  example = encode_with(
    tokenizer,
    (
      Turn(
        "Why?",
        "<think>So.",
      ),
    ),
    "llama_3",
  ).example
  assert tokenizer.convert_tokens_to_ids("<think>") in example.targets
  assert learned_texts(example, tokenizer) == ["<think>So.<|eot_id|><|end_of_text|>"]


def test_errors():
  tokenizer = TOKENIZERS["first"]
  with pytest.raises(InputError, match=r"reads <image> as \[\d+\], not as the image token 5; add"):
    encode(make_record(NORMAL), "vicuna", tokenizer, OneTile(5, 1), 1000)
  with pytest.raises(InputError, match=r'record 3 \("id": "x"\): the last turn has no answer'):
    encode_with(tokenizer, (Turn("Who?", None),), "vicuna")
  with pytest.raises(InputError, match="has no fast tokenizer"):
    encode_with(ByT5Tokenizer(), NORMAL, "vicuna")
  with pytest.raises(InputError, match="is not one of"):
    encode_with(tokenizer, NORMAL, "alpaca")
