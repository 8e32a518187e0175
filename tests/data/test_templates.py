"""Compares each prompt template with its text written out by hand."""

import pytest

from tests.data.dialogs import ONE, TEXT_ONLY, TWO, WHERE, alternating, unanswered
from tests.data.tokenizers import byte_level_tokenizer, sentencepiece_style_tokenizer
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.templates import (
  TEMPLATES,
  check_template,
  closing,
  render,
  turn_pieces,
)
from vlalign_jax.errors import InputError

LLAMA_2 = sentencepiece_style_tokenizer(legacy=True)
LLAMA_3 = byte_level_tokenizer()
HELPFUL = (
  "You are a helpful language and vision assistant. You are able to understand the visual content "
  "that the user provides, and assist the user with a variety of tasks using natural language.\n\n"
)
USER_CHAT = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
  "helpful, detailed, and polite answers to the user's questions. "
)
HUMAN_CHAT = (
  "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
  "helpful, detailed, and polite answers to the human's questions. "
)
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

EXPECTED = {
  ("default", ONE): [
    HELPFUL + "### Image:\n<image>\n\n### Question:\nWhat is it?\n\n### Answer:\n",
    "A cat.</s>",
  ],
  ("default", TEXT_ONLY): [
    HELPFUL + "### Question:\nWhat is it?\n\n### Answer:\n",
    "A cat.</s>",
  ],
  ("default", TWO): [
    HELPFUL + "### Image:\n<image>\n<image>\n\n### Question:\nCompare   and .\n\n### Answer:\n",
    "Same.</s>",
    "### Question:\nWhy?\n\n### Answer:\n",
    "Look.</s>",
    "### Image:\n<image>\n\n### Question:\nAnd\n\n### Answer:\n",
    "No</s>",
  ],
  ("llama_2", ONE): [
    "[INST] <<SYS>>\n" + HELPFUL + "\n<</SYS>>\n\n### Image:\n<image>\n\nWhat is it? [/INST]",
    " A cat.</s>",
  ],
  ("llama_2", TEXT_ONLY): [
    "[INST] <<SYS>>\n" + HELPFUL + "\n<</SYS>>\n\nWhat is it? [/INST]",
    " A cat.</s>",
  ],
  ("llama_2", TWO): [
    "[INST] <<SYS>>\n"
    + HELPFUL
    + "\n<</SYS>>\n\n### Image:\n<image>\n<image>\n\nCompare   and . [/INST]",
    " Same.</s>",
    "<s>[INST] Why? [/INST]",
    " Look.</s>",
    "<s>### Image:\n<image>\n\n[INST] And [/INST]",
    " No</s>",
  ],
  ("vicuna", ONE): [USER_CHAT + "USER: <image>\nWhat is it? ASSISTANT:", " A cat.</s>"],
  ("vicuna", TEXT_ONLY): [USER_CHAT + "USER: What is it? ASSISTANT:", " A cat.</s>"],
  ("vicuna", TWO): [
    USER_CHAT + "USER: <image>\n<image>\nCompare   and . ASSISTANT:",
    " Same.</s>",
    "USER: Why? ASSISTANT:",
    " Look.</s>",
    "USER: <image>\nAnd ASSISTANT:",
    " No</s>",
  ],
  ("llava", ONE): [HUMAN_CHAT + "USER: <image>\nWhat is it? ASSISTANT:", " A cat.</s>"],
  ("llava", TEXT_ONLY): [HUMAN_CHAT + "USER: What is it? ASSISTANT:", " A cat.</s>"],
  ("llava", TWO): [
    HUMAN_CHAT + "USER: <image>\n<image>\nCompare   and . ASSISTANT:",
    " Same.</s>",
    "USER: Why? ASSISTANT:",
    " Look.</s>",
    "USER: <image>\nAnd ASSISTANT:",
    " No</s>",
  ],
  ("plain", ONE): ["<image>\n", "A cat.</s>"],
  ("plain", TWO[:1]): ["<image>\n<image>\n", "Same.</s>"],
}

LLAMA_3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n" + HELPFUL + "<|eot_id|>"
EXPECTED_LLAMA_3 = {
  ONE: [
    LLAMA_3_SYSTEM + "### Image:\n<image>\n\n" + USER + "What is it?" + ASSISTANT,
    "A cat.<|eot_id|><|end_of_text|>",
  ],
  TEXT_ONLY: [LLAMA_3_SYSTEM + USER + "What is it?" + ASSISTANT, "A cat.<|eot_id|><|end_of_text|>"],
  TWO: [
    LLAMA_3_SYSTEM + "### Image:\n<image>\n<image>\n\n" + USER + "Compare   and ." + ASSISTANT,
    "Same.<|eot_id|>",
    USER + "Why?" + ASSISTANT,
    "Look.<|eot_id|>",
    "### Image:\n<image>\n\n" + USER + "And" + ASSISTANT,
    "No<|eot_id|><|end_of_text|>",
  ],
}


@pytest.mark.parametrize(("template", "turns"), list(EXPECTED))
def test_text_is_the_one_written_out(template, turns):
  expected = alternating(EXPECTED[template, turns])
  assert render(turns, template, LLAMA_2, WHERE) == expected
  assert turn_pieces(unanswered(turns), template, LLAMA_2, WHERE) == expected[:-1]


@pytest.mark.parametrize("turns", list(EXPECTED_LLAMA_3))
def test_llama_3_text_is_the_one_written_out(turns):
  expected = alternating(EXPECTED_LLAMA_3[turns])
  assert render(turns, "llama_3", LLAMA_3, WHERE) == expected
  assert turn_pieces(unanswered(turns), "llama_3", LLAMA_3, WHERE) == expected[:-1]


def test_llama_3_end_is_not_doubled_where_it_is_the_eos():
  tokenizer = byte_level_tokenizer()
  tokenizer.eos_token = "<|eot_id|>"
  assert render(ONE, "llama_3", tokenizer, WHERE)[-1].text == "A cat.<|eot_id|>"


def test_literals_fall_back_on_the_tokenizers_own_tokens():
  pieces = render(TWO[:2], "llama_2", LLAMA_3, WHERE)
  assert [piece.text for piece in pieces[1:]] == [
    " Same.<|end_of_text|>",
    "<|begin_of_text|>[INST] Why? [/INST]",
    " Look.<|end_of_text|>",
  ]
  assert render(ONE, "vicuna", LLAMA_3, WHERE)[-1].text == " A cat.<|end_of_text|>"
  assert render(ONE, "default", LLAMA_3, WHERE)[-1].text == "A cat.<|end_of_text|>"


def test_one_eos_follows_the_templates_own_end_token():
  tokenizer = sentencepiece_style_tokenizer(legacy=False)
  tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
  pieces = render(TWO, "vicuna", tokenizer, WHERE)
  assert [piece.text for piece in pieces[1::2]] == [
    " Same.</s>",
    " Look.</s>",
    " No</s><|endoftext|>",
  ]
  assert closing("vicuna", tokenizer) == "<|endoftext|>"
  assert turn_pieces(TWO, "vicuna", tokenizer, WHERE)[-1].text == " No</s>"


def test_errors_name_the_fix():
  with pytest.raises(InputError, match=r'"lama_3" is not one of default, .*mean "llama_3"'):
    check_template("lama_3", LLAMA_3)
  with pytest.raises(
    InputError, match=r"llama_3 needs <\|start_header_id\|>.*another data.template"
  ):
    render(ONE, "llama_3", LLAMA_2, WHERE)
  with pytest.raises(InputError, match=r'record 3 \("id": "x"\): the template plain'):
    render(TWO, "plain", LLAMA_2, WHERE)
  with pytest.raises(InputError, match=r'record 3 \("id": "x"\): the template plain'):
    render(TEXT_ONLY, "plain", LLAMA_2, WHERE)
  with pytest.raises(InputError, match=r"record 3 .*last turn has no answer"):
    render((Turn("Who?", None),), "vicuna", LLAMA_2, WHERE)
  with pytest.raises(InputError, match=r"record 3 .*turn 1 of 2 has no answer"):
    turn_pieces((Turn("Who?", None), Turn("Why?", None)), "vicuna", LLAMA_2, WHERE)
  tokenizer = byte_level_tokenizer()
  tokenizer.eos_token = None
  with pytest.raises(InputError, match="no eos token"):
    check_template("default", tokenizer)


def test_names():
  assert TEMPLATES == ("default", "llama_2", "llama_3", "vicuna", "llava", "plain", "auto")


def test_control_words_of_the_user_are_broken_up():
  turns = (Turn("<image>\nWhat is </s>?", "The <s> or <image>"), Turn("<im<image>age>?", "No"))
  pieces = render(turns, "vicuna", LLAMA_2, WHERE)
  shown = [piece.text.replace("\ufdd0", "") for piece in pieces]
  assert shown[0] == USER_CHAT + "USER: <image>\nWhat is </s>? ASSISTANT:"
  assert shown[1] == " The <s> or <image></s>"
  assert shown[2] == "USER: <image>\n<image>? ASSISTANT:"
  assert [piece.text.count("</s>") for piece in pieces] == [0, 1, 0, 1]
  assert [piece.text.count("<image>") for piece in pieces] == [1, 0, 1, 0]
  assert "<s>" not in "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(("template", "turns"), list(EXPECTED))
def test_a_system_text_replaces_the_template_s_own(template, turns):
  if template == "plain":
    with pytest.raises(InputError, match="plain has no place for the record's system text"):
      render(turns, template, LLAMA_2, WHERE, "Be brief.")
    return
  own = {"default": HELPFUL, "llama_2": HELPFUL, "vicuna": USER_CHAT, "llava": HUMAN_CHAT}[template]
  own = own.strip()
  first, *others = EXPECTED[template, turns]
  assert own in first
  expected = alternating([first.replace(own, "Be brief."), *others])
  assert render(turns, template, LLAMA_2, WHERE, " Be brief.\n") == expected
