"""Exported chat templates write what training wrote, message by message."""

import pytest

from tests.data.tokenizers import byte_level_tokenizer, sentencepiece_style_tokenizer
from vlalign_jax.data import jinja_template, templates
from vlalign_jax.data.records import Turn

TURNS = [
  Turn("<image>\n<image>\nWhat's this? \\ {x}", "It's \"a\" 'b'.\nReally."),
  Turn("And now?", "Nothing [INST] new."),
  Turn("<image>\nHere?", "No."),
]


def _messages(turns, typed):
  messages = []
  for turn in turns:
    if typed:
      content = [{"type": "image"}] * turn.human.count("<image>")
      content.append({"type": "text", "text": turn.human.replace("<image>", "")})
    else:
      content = turn.human
    messages.append({"role": "user", "content": content})
    if turn.gpt is not None:
      messages.append({"role": "assistant", "content": turn.gpt})
  return messages


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("name", ["default", "llama_2", "llama_3", "vicuna", "llava"])
def test_chat_template_renders_what_was_learnt(name, typed):
  tokenizer = (
    byte_level_tokenizer() if name == "llama_3" else sentencepiece_style_tokenizer(legacy=True)
  )
  tokenizer.chat_template = jinja_template.chat_template(name, tokenizer)
  for turns in (TURNS, TURNS[1:2], [*TURNS[:1], Turn("Open?", None)]):
    expected = "".join(
      piece.text for piece in templates.turn_pieces(turns, name, tokenizer, "here")
    )
    got = tokenizer.apply_chat_template(
      _messages(turns, typed), tokenize=False, add_generation_prompt=turns[-1].gpt is None
    )
    assert got == expected
