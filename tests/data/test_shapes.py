"""Tests that a record in any shape is read as the same record in LLaVA's own shape."""

import json

import pytest

from tests.data.twins import (
  IMAGE,
  ONE,
  PAIR,
  PICTURE,
  SYSTEM,
  TWO_TURNS,
  assert_equal,
  assistant,
  gpt,
  human,
  llava,
  read,
  text,
  user,
)
from vlalign_jax.data.encode import encode
from vlalign_jax.data.encode_preferences import encode_preferences

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
  "a part's own picture, and the record's": (
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
