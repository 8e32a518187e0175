"""Tests every form of records with ranked answers, and the error of every kind of bad one."""

import json

import pytest

from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.records import Options, load_records, scan_records
from vlalign_jax.errors import InputError


def llava(answers, *before):
  """Returns a LLaVA record whose last answer is a list."""
  roles = ("human", "gpt")
  messages = [{"from": roles[k % 2], "value": text} for k, text in enumerate(before or ("Who?",))]
  return {"id": "7", "conversations": [*messages, {"from": "gpt", "value": answers}]}


def user(content="Who?"):
  return {"role": "user", "content": content}


def assistant(content):
  return {"role": "assistant", "content": content}


def pair(**fields):
  return {"id": "7", "prompt": "Who?", "chosen": "me", "rejected": "you", **fields}


OPTIONAL = Options(answers="optional")
PICTURE = [{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]
ASKED, SEEN = (Turn("Who?", None),), (Turn("<image>\nWho?", None),)
GOOD = {
  "two answers": (llava(["me", "you"]), ASKED),
  "an empty one and the same again": (llava(["me", "you", "", "me", " "]), ASKED),
  "several turns": (
    llava(["me", "you"], "Who?", "you", "No:"),
    (Turn("Who?", "you"), Turn("No:", None)),
  ),
  "a picture": (llava(["me", "you"]) | {"image": "a.png"}, SEEN),
  "text": (pair(), ASKED),
  "RLAIF-V": (
    {"ds_name": "RLAIF-V", "idx": 3, "image_path": "x/a.png", "origin_dataset": "coco"}
    | {"image": "a.png", "question": "Who?", "chosen": "me", "rejected": "you"},
    SEEN,
  ),
  "messages": (
    pair(prompt=[user()], chosen=[assistant("me")], rejected=[assistant("you")]),
    ASKED,
  ),
  "messages of several turns": (
    pair(
      prompt=[user(), assistant("you"), user("No:")],
      chosen=[assistant("me")],
      rejected=[assistant("you")],
    ),
    (Turn("Who?", "you"), Turn("No:", None)),
  ),
  "one message": (pair(prompt=[user()], chosen=assistant("me"), rejected=assistant("you")), ASKED),
  "implicit prompt": (
    {"chosen": [user(), assistant("me")], "rejected": [user(), assistant("you")]},
    ASKED,
  ),
  "implicit prompt of several turns": (
    {
      "images": ["a.png"],
      "chosen": [user(PICTURE), assistant("you"), user("No:"), assistant("me")],
      "rejected": [user(PICTURE), assistant("you"), user("No:"), assistant("you")],
    },
    (Turn("<image>\nWho?", "you"), Turn("No:", None)),
  ),
  "prompt given twice": (
    pair(chosen=[user(), assistant("me")], rejected=[user(), assistant("you")]),
    ASKED,
  ),
  "typed parts": (
    pair(
      images=["a.png"],
      prompt=[user(PICTURE)],
      chosen=[assistant([{"type": "text", "text": "me"}])],
      rejected=[assistant([{"type": "text", "text": "yo"}, {"type": "text", "text": "u"}])],
    ),
    SEEN,
  ),
  "messages, the picture without a place": (
    pair(prompt=[user()], chosen=[assistant("me")], rejected=[assistant("you")], image="a.png"),
    SEEN,
  ),
}


@pytest.fixture
def write(tmp_path):
  (tmp_path / "a.png").touch()

  def to_file(*records):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return str(path)

  return to_file


@pytest.mark.parametrize("form", GOOD)
def test_reads(write, form):
  entry, turns = GOOD[form]
  (record,) = load_records(write(entry), Options("", "ranked", 5))
  assert record.turns == turns
  expected = entry["conversations"][-1]["value"] if "conversations" in entry else ["me", "you"]
  assert record.answers == tuple(expected)
  assert record.images == (("a.png",) if "<image>" in turns[0].human else ())
  assert load_records(write(entry), OPTIONAL) == [record]


def test_answers_are_optional(write):
  alone = {"conversations": [{"from": "human", "value": "Who?"}]}
  both = {"conversations": [*alone["conversations"], {"from": "gpt", "value": "me"}]}
  records = load_records(write(alone, both, llava(["me"])), OPTIONAL)
  assert [record.turns for record in records] == [ASKED, (Turn("Who?", "me"),), ASKED]
  assert [record.answers for record in records] == [(), (), ("me",)]


BAD = {
  "one answer only": (llava("me"), "conversations[1]: one answer only; give a list of at least"),
  "a list of one": (llava(["me"]), "conversations[1]: one answer only; give a list of at least"),
  "no answer": (
    {"id": "7", "conversations": [{"from": "human", "value": "Who?"}]},
    "conversations[0]: no answer; give a list of at least two, best first, or drop",
  ),
  "an empty list": (llava([]), "conversations[1]: the list of answers is empty; give at least two"),
  "answers that are not text": (
    llava(["me", 3]),
    'conversations[1]: "value"[1] is a number; give text',
  ),
  "answers that are messages": (
    llava(["me", {"from": "gpt", "value": "you"}]),
    'conversations[1]: "value"[1] is an object; give text',
  ),
  "too many": (
    llava(list("abcdef")),
    "conversations[1]: 6 answers, data.max_candidates is 5; raise it or leave answers out",
  ),
  "a picture in an answer": (
    pair(chosen=[assistant(PICTURE)]),
    "chosen[0]: the answer holds a picture; only questions may",
  ),
  "a list in the middle": (
    llava(["me", "you"], "Who?", ["a", "b"], "No:"),
    "conversations[1]: a list of answers; only the last message may have one",
  ),
  "a list from the human": (
    {"id": "7", "conversations": [*llava("me")["conversations"], {"from": "human", "value": []}]},
    'conversations[2]: "value" is a list; give text',
  ),
  "ranked answers of the human": (
    {
      "id": "7",
      "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": ["b", "c"]}],
    },
    'conversations[1]: "from" is "human" where "gpt" is expected',
  ),
  "an empty question": (pair(prompt=" "), '"prompt": the question is empty; give it or drop'),
  "no rejected": (
    {"id": "7", "prompt": "Who?", "chosen": "me"},
    '"chosen" and "rejected" belong together, and "rejected" is missing; give both',
  ),
  "a number": (pair(rejected=3), '"rejected" is a number; give text'),
  "null": (pair(chosen=None), '"chosen" is null; give text'),
  "a prompt that is a number": (pair(prompt=3), '"prompt" is a number; give text'),
  "an empty list of messages": (pair(chosen=[]), '"chosen" is empty; give an answer'),
  "no prompt": (
    {"id": "7", "chosen": "me", "rejected": "you"},
    '"chosen" and "rejected" have no "prompt"; give it',
  ),
  "no messages before the answer": (
    {"id": "7", "chosen": [assistant("me")], "rejected": [assistant("you")]},
    'have no "prompt"; give it',
  ),
  "other questions": (
    {"id": "7", "chosen": [user("a"), assistant("me")], "rejected": [user("b"), assistant("you")]},
    '"chosen" and "rejected" differ before their last message; give them the same prompt',
  ),
  "a question and a conversation": (
    pair(chosen=[user("a"), assistant("me")], rejected=[user("a"), assistant("you")]),
    '"chosen" begins with other messages than "prompt"; give the prompt once',
  ),
  "chosen ends with the user": (
    {"id": "7", "chosen": [user(), user()], "rejected": [user(), assistant("you")]},
    'chosen[1]: "role" is "user" where "assistant" is expected',
  ),
  "the prompt ends with an answer": (
    pair(prompt=[user(), assistant("a")]),
    '"prompt" ends with an answer; it must end with a message of the user',
  ),
  "an empty prompt": (pair(prompt=[]), '"prompt" is empty; it must end with'),
  "system message": (
    pair(prompt=[user(), assistant("a"), {"role": "system", "content": "Be kind."}]),
    '"prompt" ends with an answer; it must end with a message of the user',
  ),
  "a message that is none": (
    pair(prompt=["Who?"]),
    'prompt[0] is text; give {"role": ..., "content',
  ),
  "a part of another kind": (
    pair(prompt=[user([{"type": "video"}])]),
    "prompt[0]: content[0] is neither a text nor an image part; fix it",
  ),
  "more pictures than named": (
    pair(prompt=[user(PICTURE)]),
    "its questions hold 1 <image> but it has 0 images",
  ),
  "a picture that is not a path": (
    pair(image={"bytes": "iVBORw0K", "path": None}),
    '"image": "bytes" is text that is not a picture in base64; give a path',
  ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_record_is_named(write, mistake):
  entry, message = BAD[mistake]
  path = write(pair(), entry)
  records, (error,), _ = scan_records(path, Options("", "ranked", 5))
  assert [record.index for record in records] == [0]
  assert str(error).startswith(f'{path}, record 1 ("id": "7"): ')
  assert message in str(error)
  assert "\n" not in str(error)


def test_sft_takes_one_answer(write):
  path = write(llava(["me", "you"]), pair())
  first, second = scan_records(path).errors
  assert str(first) == (
    f'{path}, record 0 ("id": "7"): conversations[1]: a list of answers, best first, is for'
    " reward models and DPO; give one answer as text"
  )
  assert str(second) == (
    f'{path}, record 1 ("id": "7"): "chosen" and "rejected" are for reward models and DPO; give one'
    " answer as text"
  )
  with pytest.raises(InputError, match="for reward models and DPO; .*; 1 more record is bad"):
    load_records(path)
