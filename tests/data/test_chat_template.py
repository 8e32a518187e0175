"""Compares what the template `auto` cuts out of a tokenizer's chat template with texts by hand."""

import pytest

from tests.data.dialogs import TEXT_ONLY, TWO, WHERE, alternating, unanswered
from tests.data.tokenizers import sentencepiece_style_tokenizer
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.templates import render, turn_pieces
from vlalign_jax.errors import InputError

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
