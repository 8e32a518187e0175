"""Tests that exported chat templates, as servers use them, have the ids of training."""

import jinja2
import numpy as np
import pytest

from tests.data.tokenizers import byte_level_tokenizer, sentencepiece_style_tokenizer
from vlalign_jax.data import encode, jinja_template, templates
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.picture_tokens import OneTile
from vlalign_jax.data.records import Record
from vlalign_jax.input_pipeline import prompts

TURNS = [
  Turn("<image>\n<image>\nWhat's this? \\ {x}", "It's \"a\" 'b'.\nReally."),
  Turn("And now?", "Nothing [INST] new."),
  Turn("<image>\nHere?", "No."),
]
PLAIN = [Turn("<image>\n<image>\nIgnored", "A caption.")]
TOKENIZERS = {
  "bytes": byte_level_tokenizer(),
  "legacy": sentencepiece_style_tokenizer(legacy=True),
  "first": sentencepiece_style_tokenizer(legacy=False),
}
# Chat templates for `auto`: with all that is needed, without bos, and without bos and end tokens.
LLAMA_3 = (
  "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
  " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
OPEN = (
  "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TYPED = (
  "{% for m in messages %}{{ m['role'] | upper + ':\n' }}{% for p in m['content'] %}"
  "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)
NAMED = ("default", "llama_2", "vicuna", "llava", "plain")
CASES = [
  *((name, kind, None) for name in NAMED for kind in TOKENIZERS),
  ("llama_3", "bytes", None),
  ("auto", "bytes", "{{ bos_token }}" + LLAMA_3),
  ("auto", "bytes", LLAMA_3),
  *(("auto", kind, text) for text in (OPEN, TYPED) for kind in TOKENIZERS),
]


def messages_of(turns, typed, system=None):
  messages = []
  for turn in turns:
    if typed:
      content = [{"type": "image"}] * turn.human.count("<image>")
      content.append({"type": "text", "text": turn.human.replace("<image>", "").strip()})
    else:
      content = turn.human
    messages.append({"role": "user", "content": content})
    if turn.gpt is not None:
      content = [{"type": "text", "text": turn.gpt}] if typed else turn.gpt
      messages.append({"role": "assistant", "content": content})
  system = [{"role": "system", "content": system}] if system else []
  return system + messages


def exported(name, kind, text):
  """Returns (tokenizer of training, the same with the chat template of an export)."""
  made = [
    byte_level_tokenizer()
    if kind == "bytes"
    else sentencepiece_style_tokenizer(legacy=kind == "legacy")
    for _ in range(2)
  ]
  if text:
    for tokenizer in made:
      tokenizer.chat_template = text
  made[1].chat_template = jinja_template.chat_template(name, made[0])
  return made


def ids_of(tokenizer, messages, **options):
  return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize(
  ("name", "kind", "text", "typed"),
  # A tokenizer's own template takes one kind of content only.
  [
    (*case, typed)
    for case in CASES
    for typed in (False, True)
    if case[0] != "auto" or typed == (case[2] == TYPED)
  ],
)
def test_ids_are_those_of_training(name, kind, text, typed):
  trained, served = exported(name, kind, text)
  image = trained.convert_tokens_to_ids("<image>")
  turns = PLAIN if name == "plain" else TURNS
  if typed is False and name == "auto":  # such a template takes text where it stands
    turns = [
      Turn("<image>\n" + turn.human.replace("<image>", "").strip(), turn.gpt) for turn in TURNS
    ]
  for part in (turns, turns[:1]):
    record = Record("t.json", 0, "x", ("a",) * 9, tuple(part), ())
    options = (name, trained, OneTile(image, 1), 10_000)
    example = encode.encode(record, *options).example
    got = ids_of(served, messages_of(part, typed))
    if name == "auto":  # such a template may write more after the last end token
      got = got[: len(example.tokens)]
    np.testing.assert_array_equal(got, example.tokens)
    prompt = prompts.encode_prompt(record, *options).example
    asked = [*part[:-1], Turn(part[-1].human, None)]
    got = ids_of(served, messages_of(asked, typed), add_generation_prompt=True)
    np.testing.assert_array_equal(got, prompt.tokens)


@pytest.mark.parametrize("name", templates.TEMPLATES[:-2])
def test_a_system_message_takes_the_place_of_the_default(name):
  trained, served = exported(name, "bytes", None)
  default = templates.named_parts(name, trained).default_system
  usual = served.apply_chat_template(messages_of(TURNS, False), tokenize=False)
  for typed in (False, True):
    for system in ("Answer in <one> word.", default):
      content = [{"type": "text", "text": system}] if typed else system
      got = served.apply_chat_template(messages_of(TURNS, typed, content), tokenize=False)
      assert got == usual.replace(default, system)
      assert got.count(system) == 1
  for role in ("system", "tool"):
    messages = [*messages_of(TURNS, False), {"role": role, "content": "x"}]
    with pytest.raises(jinja2.TemplateError, match=f"not {role}"):
      served.apply_chat_template(messages, tokenize=False)


def test_plain_takes_no_system_message():
  served = exported("plain", "bytes", None)[1]
  with pytest.raises(jinja2.TemplateError, match="plain takes no system message"):
    served.apply_chat_template(messages_of(PLAIN, False, "Hi"), tokenize=False)


@pytest.mark.parametrize(
  ("name", "kind", "text"),
  [case for case in CASES if case[0] != "plain"],  # it asks no question
)
def test_an_exported_template_stays_as_it_is(name, kind, text):
  """A run with `auto` of an export learns the same ids, and exports the same template."""
  trained, served = exported(name, kind, text)
  again = jinja_template.chat_template("auto", served)
  assert again == served.chat_template
  turns = [Turn(turn.human.replace("<image>\n", ""), turn.gpt) for turn in TURNS]
  record = Record("t.json", 0, "x", (), tuple(turns), ())
  image = trained.convert_tokens_to_ids("<image>")
  first, second = (
    encode.encode(record, template, tokenizer, OneTile(image, 1), 10_000).example.tokens
    for template, tokenizer in ((name, trained), ("auto", served))
  )
  np.testing.assert_array_equal(second, first[: len(second)])
