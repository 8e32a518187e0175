"""Makes turns of a record's messages: questions and answers, ranked answers, pictures in place."""

from dataclasses import dataclass
from typing import Any, Literal

from vlalign_jax.data import pictures, shapes
from vlalign_jax.data.shapes import Message
from vlalign_jax.data.values import as_text
from vlalign_jax.errors import InputError

IMAGE_PLACEHOLDER = "<image>"

# What the last question must have: one answer, a ranked list of at least two, or anything.
Answers = Literal["one", "ranked", "optional"]


@dataclass(frozen=True, slots=True)
class Turn:
  """A question, its `<image>` placeholders still inside, and its answer (None: to be generated).

  In an answer `<image>` is a word like any other.
  """

  human: str
  gpt: str | None


@dataclass(frozen=True)
class Conversation:
  """The messages of a record.

  Attributes:
    turns: at least one; the last lacks its answer if there are ranked ones or none.
    answers: ranked answers to the last question, best first; they may be empty or equal.
    places: how errors name each question.
    pictures: for each placeholder of all questions, in order, the picture that its message holds
      (see `pictures.locate`); None: the record's next one.
    system: the text that replaces the template's own system text; None: there is none.
    keys: those of the record that were read.
  """

  turns: tuple[Turn, ...]
  answers: tuple[str, ...]
  places: tuple[str, ...]
  pictures: tuple[Any, ...]
  system: str | None
  keys: frozenset[str]


def parse(entry: dict[str, Any], answers: Answers, max_candidates: int | None) -> Conversation:
  """Returns the conversation of a record of any shape in docs/data.md.

  Args:
    entry: the parsed JSON of the record.
    answers: what the last question must have.
    max_candidates: the most ranked answers of a record; None for no limit.

  Raises:
    InputError: the record is bad; the message does not name it.
  """
  dialog = shapes.read(entry)
  messages, ranked = dialog.messages, dialog.answers
  system, messages = _system(entry, messages)
  if not messages:
    raise InputError("the system's message is the only one; give a question")
  if ranked is None and (listed := _ranked_list(messages)) is not None:
    ranked, messages = listed, messages[:-1]
  turns, shown = _turns(messages)
  texts = tuple(_answer(answer) for answer in ranked or ())
  _check_answers(turns, texts, dialog.last, answers, max_candidates)
  places = tuple(message.place for message in messages[::2])
  keys = dialog.keys | {"system", "system_prompt"}
  return Conversation(turns, texts, places, shown, system, keys)


def _check_answers(
  turns: tuple[Turn, ...],
  ranked: tuple[str, ...],
  last: str,
  answers: Answers,
  max_candidates: int | None,
) -> None:
  """Raises an InputError unless the last question has the answers that the stage wants."""
  number, unanswered = len(ranked), turns[-1].gpt is None
  if answers == "one" and number:
    is_pair = last == shapes.PAIR
    state = f"{last} are" if is_pair else f"{last}: a list of answers, best first, is"
    raise InputError(f"{state} for reward models and DPO; give one answer as text")
  if answers == "one" and unanswered:
    raise InputError(f"{last}: the last question has no answer; add it")
  if answers == "ranked" and number < 2:
    state = "no answer" if not number and unanswered else "one answer only"
    raise InputError(
      f"{last}: {state}; give a list of at least two, best first, or drop the record"
    )
  if answers == "ranked" and max_candidates is not None and number > max_candidates:
    raise InputError(
      f"{last}: {number} answers, data.max_candidates is {max_candidates};"
      " raise it or leave answers out"
    )


def _system(entry: dict[str, Any], messages: list[Message]) -> tuple[str | None, list[Message]]:
  """Returns the record's system text, and the messages without it."""
  texts = [
    as_text(entry[key], f'"{key}"').strip()
    for key in ("system", "system_prompt")
    if entry.get(key) is not None
  ]
  if messages[0].role == "system":
    text, shown = _content(messages[0])
    if shown:
      raise InputError(f"{messages[0].place}: the system text holds a picture; only questions may")
    texts.append(text.strip())
    messages = messages[1:]
  texts = [text for text in dict.fromkeys(texts) if text]
  if len(texts) > 1:
    raise InputError("has several system texts that differ; keep one of them")
  return (texts[0] if texts else None), messages


def _ranked_list(messages: list[Message]) -> list[Message] | None:
  """Returns the answers of a last message that holds a list of them, best first."""
  last = messages[-1]
  if len(messages) % 2 or not isinstance(last.content, list) or _is_parts(last.content):
    return None
  if last.role != "assistant":
    raise shapes.wrong_role(last, "assistant")
  if not last.content:
    raise InputError(f"{last.place}: the list of answers is empty; give at least two, best first")
  key = f': "{last.keys[1]}"' if "[" in last.place else ""
  return [
    Message("assistant", as_text(text, f"{last.place}{key}[{rank}]"), f"{last.place}{key}[{rank}]")
    for rank, text in enumerate(last.content)
  ]


def _turns(messages: list[Message]) -> tuple[tuple[Turn, ...], tuple[Any, ...]]:
  """Returns (turns, the picture of each placeholder) of messages that take turns."""
  texts, shown = [], []
  for number, message in enumerate(messages):
    expected = ("user", "assistant")[number % 2]
    if message.role != expected:
      raise shapes.wrong_role(message, expected)
    if number % 2 == 0:
      text, found = _content(message)
      shown += found
    else:
      text = _answer(message)
      if not text.strip():
        raise InputError(f"{message.place}: the answer is empty; give it or drop the record")
    texts.append(text)
  answers = [*texts[1::2], None][: (len(texts) + 1) // 2]
  turns = tuple(Turn(human, gpt) for human, gpt in zip(texts[::2], answers, strict=True))
  return turns, tuple(shown)


def _answer(message: Message) -> str:
  if isinstance(message.content, list) and not _is_parts(message.content):
    raise InputError(f"{message.place}: a list of answers; only the last message may have one")
  if _is_parts(message.content) and any(part["type"] != "text" for part in message.content):
    raise InputError(f"{message.place}: the answer holds a picture; only questions may")
  return _content(message)[0]


def _content(message: Message) -> tuple[str, list[Any]]:
  """Returns a message's text with `<image>` for each picture, and the picture of each (or None)."""
  place, value = message.place, message.content
  if not _is_parts(value):
    name = f'{place}: "{message.keys[1]}"' if "[" in place else place
    text = as_text(value, name)
    return text, [None] * text.count(IMAGE_PLACEHOLDER)
  text, shown = "", []
  for number, part in enumerate(value):
    if part["type"] in ("image", "image_url"):
      text += f"{IMAGE_PLACEHOLDER}\n"
      shown.append(pictures.of_part(part))
    elif part["type"] == "text":
      words = as_text(part.get("text"), f'{place}: content[{number}]: "text"')
      text += words
      shown += [None] * words.count(IMAGE_PLACEHOLDER)
    else:
      raise InputError(f"{place}: content[{number}] is neither a text nor an image part; fix it")
  return text, shown


def _is_parts(content: Any) -> bool:
  """Returns whether a content is a list of typed parts, such as {"type": "text", "text": ...}."""
  return (
    isinstance(content, list)
    and bool(content)
    and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
  )
