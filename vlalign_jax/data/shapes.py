"""Reads the shapes in which other tools keep conversations, as messages in one form.

| shape | keys |
|---|---|
| LLaVA, LLaMA-Factory | `conversations`: `from` and `value`, or `role` and `content` |
| TRL, OpenAI | `messages`: `role` and `content`, which is text or parts |
| TRL | `prompt`, and `completion`, or `chosen` and `rejected`: text or messages |
| TRL, implicit prompt | `chosen` and `rejected`: messages |
| LLaMA-Factory, ranking | `conversations` or `messages`, `chosen` and `rejected` |
| Alpaca, LLaMA-Factory | `instruction`, `input`, `output` or `chosen` and `rejected`, `history` |
| RLAIF-V | `question`, `chosen`, `rejected` |
| LLaVA-Human-Preference-10K | `conversations`, `output_1`, `output_2`, `preference` |
| vision-feedback-mix-binarized | `conversations`, whose last message has `preference_values` |
"""

import json
from dataclasses import dataclass
from typing import Any

from vlalign_jax.data.values import as_text, kind, quote
from vlalign_jax.errors import InputError

PAIR = '"chosen" and "rejected"'
ROLES = {
  **{"human": "user", "user": "user"},
  **{"gpt": "assistant", "assistant": "assistant"},
  "system": "system",
}


@dataclass(frozen=True)
class Message:
  """One message of a record.

  Attributes:
    role: "user", "assistant" or "system"; None if the record says something else.
    content: text, or a list of parts; of the last answer also a list of ranked answers.
    place: how errors name it.
    written_role: what the record says.
    keys: of role and content in the record, for errors: ("from", "value") for example.
  """

  role: str | None
  content: Any
  place: str
  written_role: Any = None
  keys: tuple[str, str] = ("role", "content")


@dataclass(frozen=True)
class Dialog:
  """The messages of a record of any shape.

  Attributes:
    messages: in order; they need not take turns.
    answers: ranked answers to the last question, as messages, best first; None: the shape has none.
    last: how errors name what holds the last answer or answers.
    keys: those of the record that the shape reads.
  """

  messages: list[Message]
  answers: list[Message] | None
  last: str
  keys: frozenset[str]


def read(entry: dict[str, Any]) -> Dialog:
  """Returns the messages of a record, whose shape its keys tell.

  Raises:
    InputError: the record has none of the shapes, or has one of them wrongly.
  """
  named = [key for key in ("conversations", "messages") if entry.get(key) is not None]
  if len(named) > 1:
    raise InputError('has "conversations" and "messages"; keep one of them')
  if named or "conversations" in entry:
    return _conversations(entry, named[0] if named else "conversations")
  if entry.get("instruction") is not None:
    return _instruction(entry)
  if any(entry.get(key) is not None for key in ("prompt", "question", "chosen", "rejected")):
    return _prompt(entry)
  raise InputError(
    '"conversations" is missing, and there is no "messages", "prompt" or "instruction" either;'
    " docs/data.md shows what is read"
  )


def _conversations(entry: dict[str, Any], key: str) -> Dialog:
  messages = _messages(entry[key], key)
  last, keys = messages[-1].place, {key}
  if _has_pair(entry):
    dialog = Dialog(messages, _pair(entry), PAIR, frozenset({key, "chosen", "rejected"}))
    return _check_asks(dialog, key)
  if entry.get("output_1") is not None or entry.get("output_2") is not None:
    if messages[-1].role == "assistant":  # a reference answer, which both outputs replace
      messages = messages[:-1]
    keys |= {"output_1", "output_2", "preference"}
    return _check_asks(Dialog(messages, _outputs(entry), last, frozenset(keys)), key)
  return Dialog(messages, None, last, frozenset(keys))


def _prompt(entry: dict[str, Any]) -> Dialog:
  """Reads TRL's forms (explicit or implicit prompt, messages or plain text) and RLAIF-V's."""
  name = next((key for key in ("prompt", "question") if entry.get(key) is not None), None)
  if name is not None and not _has_pair(entry):
    messages, keys = _text_or_messages(entry[name], name, "user"), frozenset({name, "completion"})
    if entry.get("completion") is None:
      return Dialog(messages, None, messages[-1].place, keys)
    messages += _text_or_messages(entry["completion"], "completion", "assistant")
    return Dialog(messages, None, messages[-1].place, keys)
  keys = frozenset({"chosen", "rejected", *((name,) if name else ())})
  chosen, rejected = (_completion(entry, key) for key in ("chosen", "rejected"))
  shared, other = chosen[:-1], rejected[:-1]
  if _contents(shared) != _contents(other):
    raise InputError(f"{PAIR} differ before their last message; give them the same prompt")
  if name is None:
    if not shared:
      raise InputError(f'{PAIR} have no "prompt"; give it')
    messages = shared
  else:
    messages = _text_or_messages(entry[name], name, "user")
    if shared and _contents(shared) != _contents(messages):
      raise InputError(f'"chosen" begins with other messages than "{name}"; give the prompt once')
  dialog = Dialog(messages, [chosen[-1], rejected[-1]], PAIR, keys)
  return _check_asks(dialog, name or "chosen")


def _instruction(entry: dict[str, Any]) -> Dialog:
  """Reads Alpaca's form as LLaMA-Factory does: the input follows the instruction on a new line."""
  messages = []
  for number, pair in enumerate(entry.get("history") or ()):
    if not isinstance(pair, list) or len(pair) != 2:
      raise InputError(f"history[{number}] is {kind(pair)}; give [question, answer]")
    for role, text in zip(("user", "assistant"), pair, strict=True):
      messages.append(Message(role, text, f"history[{number}]"))
  parts = [
    as_text(entry[key], f'"{key}"')
    for key in ("instruction", "input")
    if entry.get(key) is not None
  ]
  question = "\n".join(part for part in parts if part)
  messages.append(Message("user", question, '"instruction"'))
  keys = {"instruction", "input", "history"}
  if _has_pair(entry):
    return Dialog(messages, _pair(entry), PAIR, frozenset(keys | {"chosen", "rejected"}))
  if entry.get("output") is None:
    return Dialog(messages, None, '"instruction"', frozenset(keys))
  messages.append(Message("assistant", entry["output"], '"output"'))
  return Dialog(messages, None, '"output"', frozenset(keys | {"output"}))


def _has_pair(entry: dict[str, Any]) -> bool:
  return entry.get("chosen") is not None or entry.get("rejected") is not None


def _pair(entry: dict[str, Any]) -> list[Message]:
  """Returns the answers of `chosen` and `rejected` behind a conversation."""
  answers = []
  for key in ("chosen", "rejected"):
    *before, answer = _completion(entry, key)
    if before:
      raise InputError(f'"{key}" holds several messages, and the prompt is given; give the answer')
    answers.append(answer)
  return answers


def _completion(entry: dict[str, Any], key: str) -> list[Message]:
  if key not in entry:
    raise InputError(f'{PAIR} belong together, and "{key}" is missing; give both')
  if entry[key] == []:
    raise InputError(f'"{key}" is empty; give an answer')
  messages = _text_or_messages(entry[key], key, "assistant")
  if messages[-1].role != "assistant":
    raise wrong_role(messages[-1], "assistant")
  return messages


def _outputs(entry: dict[str, Any]) -> list[Message]:
  answers = []
  for key in ("output_1", "output_2"):
    output = entry.get(key)
    output = output.get("value") if isinstance(output, dict) else output
    answers.append(Message("assistant", as_text(output, f'"{key}"'), f'"{key}"'))
  if entry.get("preference") not in (1, 2):
    raise InputError(f'"preference" is {quote(entry.get("preference"))}; it must be 1 or 2')
  return answers if entry["preference"] == 1 else answers[::-1]


def _check_asks(dialog: Dialog, name: str) -> Dialog:
  """Raises an InputError unless the messages before ranked answers end with a question."""
  if not dialog.messages or dialog.messages[-1].role != "user":
    state = "ends with an answer" if dialog.messages else "is empty"
    raise InputError(f'"{name}" {state}; it must end with a message of the user')
  return dialog


def _text_or_messages(value: Any, name: str, role: str) -> list[Message]:
  if isinstance(value, dict) and not all(isinstance(part, list) for part in value.values()):
    value = [value]
  if isinstance(value, (list, dict)):
    if not value:
      raise InputError(f'"{name}" is empty; it must end with a message of the user')
    return _messages(value, name)
  return [Message(role, as_text(value, f'"{name}"'), f'"{name}"')]


def _messages(value: Any, name: str) -> list[Message]:
  """Returns the messages of a list; also from its JSON, or from a list of one list."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as error:
      raise InputError(f'"{name}" holds malformed JSON ({error}); fix it') from error
  if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
    value = value[0]
  if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
    # `datasets` keeps a list of objects as an object of lists.
    value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=False)]
  if not isinstance(value, list) or not value:
    state = "empty" if value == [] else kind(value)
    raise InputError(f'"{name}" is {state}; give a list of human and gpt messages')
  return [_message(one, f"{name}[{place}]", name) for place, one in enumerate(value)]


def _message(value: Any, place: str, name: str) -> Message:
  keys = ("from", "value") if name == "conversations" else ("role", "content")
  if not isinstance(value, dict):
    raise InputError(f'{place} is {kind(value)}; give {{"{keys[0]}": ..., "{keys[1]}": ...}}')
  for pair in (("from", "value"), ("role", "content")):
    if value.get(pair[0]) is not None:
      keys = pair
  role, content = value.get(keys[0]), value.get(keys[1])
  if content is None:
    content = value.get("preference_values")
  known = ROLES.get(role) if isinstance(role, str) else None
  return Message(known, content, place, role, keys)


def wrong_role(message: Message, expected: str) -> InputError:
  """Returns the error for a message of another role than is expected at its place."""
  key, _ = message.keys
  names = {"user": "human", "assistant": "gpt"} if key == "from" else {}
  human, model = (names.get(role, role) for role in ("user", "assistant"))
  return InputError(
    f'{message.place}: "{key}" is {quote(message.written_role)} where'
    f' "{names.get(expected, expected)}" is expected; {human} and {model} take turns, {human} first'
  )


def _contents(messages: list[Message]) -> list[tuple[str | None, Any]]:
  return [(message.role, message.content) for message in messages]
