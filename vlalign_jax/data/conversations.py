"""Parses a record's messages: LLaVA's `conversations`, or TRL's `chosen` and `rejected`."""

from dataclasses import dataclass
from typing import Any, Literal

from vlalign_jax.data.json_entries import as_text, kind, quote
from vlalign_jax.errors import InputError

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_LAST = '"chosen" and "rejected"'

# What the last question must have: one answer, a ranked list of at least two, or anything.
Answers = Literal["one", "ranked", "optional"]


@dataclass(frozen=True, slots=True)
class Turn:
  """A question, its `<image>` placeholders still inside, and its answer (None: to be generated)."""

  human: str
  gpt: str | None


@dataclass(frozen=True)
class Conversation:
  """The messages of a record.

  Attributes:
    turns: at least one; the last lacks its answer if there are ranked ones or none.
    answers: ranked answers to the last question, best first; they may be empty or equal.
    places: how errors name each question.
  """

  turns: tuple[Turn, ...]
  answers: tuple[str, ...]
  places: tuple[str, ...]


def parse(entry: dict[str, Any], answers: Answers, max_candidates: int | None) -> Conversation:
  """Returns the conversation of a record in any of the forms in docs/data.md.

  Args:
    entry: the parsed JSON of the record.
    answers: what the last question must have.
    max_candidates: the most ranked answers of a record; None for no limit.

  Raises:
    InputError: the record is bad; the message does not name it.
  """
  if "conversations" not in entry and ("chosen" in entry or "rejected" in entry):
    conversation, last = _pair(entry), _LAST
  else:
    conversation, last = _llava(entry)
  number = len(conversation.answers)
  unanswered = conversation.turns[-1].gpt is None
  if answers == "one" and number:
    state = (
      f"{_LAST} are" if last == _LAST else f'{last}: "value" is a list of answers, best first,'
    )
    raise InputError(
      f'{state} for reward models and DPO; give one answer as text in "conversations"'
    )
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
  return conversation


def _llava(entry: dict[str, Any]) -> tuple[Conversation, str]:
  """Returns (the conversation, how errors name its last message)."""
  messages = entry.get("conversations")
  if not isinstance(messages, list) or not messages:
    state = kind(messages) if messages else "empty" if "conversations" in entry else "missing"
    raise InputError(f'"conversations" is {state}; give a list of human and gpt messages')
  last = f"conversations[{len(messages) - 1}]"
  answers: tuple[str, ...] = ()
  final = messages[-1]
  if len(messages) % 2 == 0 and isinstance(final, dict) and isinstance(final.get("value"), list):
    ranked = final["value"]
    if not ranked:
      raise InputError(f"{last}: the list of answers is empty; give at least two, best first")
    answers = tuple(_answer(text, f'{last}: "value"[{k}]') for k, text in enumerate(ranked))
    _check_role(final, last, "from", 1)
    messages = messages[:-1]
  turns, places = _turns(messages, "conversations", "from", "value")
  return Conversation(turns, answers, places), last


def _pair(entry: dict[str, Any]) -> Conversation:
  """Parses TRL's forms (explicit or implicit prompt, messages or plain text) and RLAIF-V's."""
  shared, answers = [], []
  for key in ("chosen", "rejected"):
    if key not in entry:
      raise InputError(f'{_LAST} belong together, and "{key}" is missing; give both')
    completion = entry[key]
    if isinstance(completion, dict):
      completion = [completion]
    if not isinstance(completion, list):
      shared.append([])
      answers.append(_answer(completion, f'"{key}"'))
      continue
    if not completion:
      raise InputError(f'"{key}" is empty; give an answer')
    place = f"{key}[{len(completion) - 1}]"
    _check_role(completion[-1], place, "role", 1)
    shared.append(completion[:-1])
    answers.append(_answer(_content(completion[-1].get("content"), place), place))
  if shared[0] != shared[1]:
    raise InputError(f"{_LAST} differ before their last message; give them the same prompt")

  name = next((key for key in ("prompt", "question") if entry.get(key) is not None), "chosen")
  prompt = shared[0] if name == "chosen" else entry[name]
  if name == "chosen" and not prompt:
    raise InputError(f'{_LAST} have no "prompt"; give it')
  if not isinstance(prompt, list):
    prompt = [{"role": "user", "content": as_text(prompt, f'"{name}"')}]
  if shared[0] and shared[0] != prompt:
    raise InputError(f'"chosen" begins with other messages than "{name}"; give the prompt once')
  if len(prompt) % 2 == 0:
    state = "ends with an answer" if prompt else "is empty"
    raise InputError(f'"{name}" {state}; it must end with a message of the user')
  turns, places = _turns(prompt, name, "role", "content")
  if not isinstance(entry.get(name), list):
    places = (f'"{name}"',)
  return Conversation(turns, tuple(answers), places)


def _turns(
  messages: list[Any], name: str, role_key: str, text_key: str
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
  """Returns (turns, how errors name each question) of alternating messages."""
  values = []
  for number, message in enumerate(messages):
    place = f"{name}[{number}]"
    _check_role(message, place, role_key, number % 2)
    value = message.get(text_key)
    value = _content(value, place) if text_key == "content" else value
    if number % 2 and isinstance(value, list):
      raise InputError(f"{place}: a list of answers; only the last message may have one")
    values.append(as_text(value, f'{place}: "{text_key}"'))
    if number % 2 and not values[-1].strip():
      raise InputError(f"{place}: the answer is empty; give it or drop the record")
    if number % 2:
      _answer(values[-1], place)
  answers = [*values[1::2], None][: (len(values) + 1) // 2]
  turns = tuple(Turn(human, gpt) for human, gpt in zip(values[::2], answers, strict=True))
  return turns, tuple(f"{name}[{2 * number}]" for number in range(len(turns)))


def _check_role(message: Any, place: str, key: str, side: int) -> None:
  """Raises an InputError unless this is a message of the human (side 0) or the model (side 1)."""
  if not isinstance(message, dict):
    text_key = "value" if key == "from" else "content"
    raise InputError(f'{place} is {kind(message)}; give {{"{key}": ..., "{text_key}": ...}}')
  words = ("human", "gpt") if key == "from" else ("user", "assistant")
  role = message.get(key)
  if not isinstance(role, str) or _ROLES.get(role) != ("human", "gpt")[side]:
    raise InputError(
      f'{place}: "{key}" is {quote(role)} where "{words[side]}" is expected;'
      f" {words[0]} and {words[1]} take turns, {words[0]} first"
    )


def _content(value: Any, place: str) -> Any:
  """Returns the text of [{"type": "image"}, {"type": "text", "text": "What?"}] or plain text."""
  if not isinstance(value, list):
    return value
  text = ""
  for number, part in enumerate(value):
    form = part.get("type") if isinstance(part, dict) else None
    if form == "image":
      text += f"{IMAGE_PLACEHOLDER}\n"
    elif form == "text":
      text += as_text(part.get("text"), f'{place}: content[{number}]: "text"')
    else:
      raise InputError(f"{place}: content[{number}] is neither a text nor an image part; fix it")
  return text


def _answer(value: Any, place: str) -> str:
  answer = as_text(value, place)
  if IMAGE_PLACEHOLDER in answer:
    raise InputError(f"{place}: the answer holds {IMAGE_PLACEHOLDER}; only questions may")
  return answer
