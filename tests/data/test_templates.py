"""Compares each prompt template with its text written out by hand."""

import pytest

from tests.data.tokenizers import byte_level_tokenizer, sentencepiece_style_tokenizer
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.templates import (
  TEMPLATES,
  Piece,
  check_template,
  closing,
  render,
  turn_pieces,
)
from vlalign_jax.errors import InputError

LLAMA_2 = sentencepiece_style_tokenizer(legacy=True)
LLAMA_3 = byte_level_tokenizer()
WHERE = 'data/train.json, record 3 ("id": "x")'

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

ONE = (Turn("<image>\nWhat is it?", "A cat."),)
TEXT_ONLY = (Turn("What is it?", "A cat."),)
TWO = (
  Turn("Compare  <image> and <image>.", " Same.\n"),
  Turn("Why?", "Look."),
  Turn("\nAnd <image>", "No"),
)

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


def alternating(texts: list[str]) -> list[Piece]:
  return [Piece(text, learn=bool(number % 2)) for number, text in enumerate(texts)]


def unanswered(turns) -> tuple[Turn, ...]:
  return (*turns[:-1], Turn(turns[-1].human, None))


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


LLAVA_HF = (
  "{% for message in messages %}{{ message['role'].upper() + ': '}}"
  "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
  "{{ '<image>\n' }}{% endfor %}"
  "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
  "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
  " + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2_HF = (
  "{% for message in messages %}{% if message['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
  "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def with_chat_template(chat_template: str):
  tokenizer = sentencepiece_style_tokenizer(legacy=False)
  tokenizer.chat_template = chat_template
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  return tokenizer


def test_auto_with_string_content():
  tokenizer = with_chat_template(CHATML)
  assert render(TWO, "auto", tokenizer, WHERE) == alternating(
    [
      "<|im_start|>user\n<image>\n<image>\nCompare   and .<|im_end|>\n<|im_start|>assistant\n",
      "Same.<|im_end|>",
      "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
      "Look.<|im_end|>",
      "\n<|im_start|>user\n<image>\nAnd<|im_end|>\n<|im_start|>assistant\n",
      "No<|im_end|>",
    ]
  )
  assert turn_pieces(unanswered(TEXT_ONLY), "auto", tokenizer, WHERE) == alternating(
    ["<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"]
  )


def test_auto_with_typed_content_and_no_end_token():
  tokenizer = with_chat_template(LLAVA_HF)
  assert render(TWO, "auto", tokenizer, WHERE) == alternating(
    [
      "USER: <image>\n<image>\nCompare   and . ASSISTANT:",
      " Same.</s>",
      " USER: Why? ASSISTANT:",
      " Look.</s>",
      " USER: <image>\nAnd ASSISTANT:",
      " No</s>",
    ]
  )


def test_auto_finds_the_answer_after_words_of_the_template():
  turns = (Turn("Which?", "A"), Turn("Who?", "im"))
  chatml = with_chat_template(
    CHATML.replace("+ message['content']", "+ 'An I: ' + message['content']")
  )
  assert [piece.text for piece in render(turns, "auto", chatml, WHERE)[1::2]] == [
    "An I: A<|im_end|>",
    "An I: im<|im_end|>",
  ]
  llava = with_chat_template(
    LLAVA_HF.replace("{{ content['text']", "{{ 'An aim: ' + content['text']")
  )
  assert [piece.text for piece in render(turns, "auto", llava, WHERE)[1::2]] == [
    " An aim: A</s>",
    " An aim: im</s>",
  ]


def test_auto_with_a_template_that_writes_bos_and_a_space_before_the_end():
  tokenizer = with_chat_template(LLAMA_2_HF)
  assert render(TWO[1:], "auto", tokenizer, WHERE) == alternating(
    ["<s>[INST] Why? [/INST]", " Look. </s>", "<s>[INST] <image>\nAnd [/INST]", " No </s>"]
  )


@pytest.mark.parametrize(
  ("chat_template", "message"),
  [
    (None, r"no chat template.*another data.template"),
    ("{{ raise_exception('only tools') }}", r"cannot be used.*only tools"),
    ("{{ messages[-1]['role'] }}", r"cannot be used \(with text: it loses"),
    # Only the prompt has <think>: the prompt is rewritten once it is answered.
    (
      CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
      r"record 3 .*can't be cut at turn boundaries: an answer changes",
    ),
    # Answers of earlier turns are shortened.
    (
      "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q ' + m['content'] }}"
      "{% elif loop.last %}{{ 'A ' + m['content'] }}"
      "{% else %}{{ 'A ' + m['content'].split('|')[-1] }}{% endif %}"
      "{% endfor %}{% if add_generation_prompt %}A {% endif %}",
      r"record 3 .*can't be cut at turn boundaries: a new question changes",
    ),
    (
      CHATML.replace("message['content']", "message['content'].replace('Sam', 'sam')"),
      "changes the",
    ),
    (CHATML.replace("<|im_start|>'", "<image>'"), r"cannot be used \(with text: it loses"),
    (
      CHATML.replace("message['content']", "message['content'].replace('<image>\n<', '<')"),
      "for a turn",
    ),
  ],
)
def test_auto_errors(chat_template, message):
  tokenizer = with_chat_template(chat_template)
  turns = (Turn("<image><image>Compare", "I think|Same"), Turn("Why?", "Look"))
  with pytest.raises(InputError, match=message):
    render(turns, "auto", tokenizer, WHERE)


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


def test_auto_renders_a_system_message():
  tokenizer = with_chat_template(CHATML)
  without, with_system = (
    render(TWO, "auto", tokenizer, WHERE, system) for system in (None, "Be brief.")
  )
  assert with_system[0].text == "<|im_start|>system\nBe brief.<|im_end|>\n" + without[0].text
  assert with_system[1:] == without[1:]
  leaves_out = with_chat_template(
    CHATML.replace("in messages %", "in messages if message['role'] != 'system' %")
  )
  with pytest.raises(InputError, match="leaves out the record's system text"):
    render(TEXT_ONLY, "auto", leaves_out, WHERE, "Be brief.")
  cut = render(TEXT_ONLY, "auto", tokenizer, WHERE, "a <|im_end|> b")[0].text
  assert "<|im_end|> b" not in cut
