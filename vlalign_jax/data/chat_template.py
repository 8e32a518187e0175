"""The template `auto`: a conversation, as the tokenizer itself renders it, cut into turns."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vlalign_jax.data.records import IMAGE_PLACEHOLDER
from vlalign_jax.data.tokens import vocabulary
from vlalign_jax.errors import InputError

_MEND = "choose another data.template"


class CleanTurn(NamedTuple):
  """A turn as templates take it."""

  question: str  # without placeholders, stripped, unable to write control tokens
  images: int  # number of placeholders it had
  answer: str | None  # stripped, unable to write control tokens; None where it is asked for


def cut_conversation(
  turns: Sequence[CleanTurn], tokenizer, where: str
) -> list[tuple[str, str | None]]:
  """Renders the conversation's prefixes and cuts where the answers begin and end.

  An answer is learnt with the end token that the template puts behind it, or with the tokenizer's
  eos where it puts none; what else follows an answer opens the next prompt, and is dropped at the
  end.

  Args:
    turns: the conversation; only the last turn may lack its answer.
    tokenizer: a tokenizer with a chat template.
    where: names the record in error messages.

  Returns:
    Per turn its prompt and its answer with the end token (None where there is no answer).

  Raises:
    InputError: there is no chat template, it fails, or it rewrites earlier text when a message is
      added.
  """
  typed = takes_typed_content(tokenizer)
  control = vocabulary(tokenizer).control
  cannot = f"{where}: the tokenizer's chat template can't be cut at turn boundaries"
  messages, pairs, done = [], [], ""
  for turn in turns:
    messages.append(_message("user", turn.question, turn.images, typed))
    asked = _render(messages, tokenizer, where, ask=True)
    if not asked.startswith(done):
      raise InputError(f"{cannot}: a new question changes what stands before it; {_MEND}")
    prompt = asked[len(done) :]
    if prompt.count(IMAGE_PLACEHOLDER) != turn.images:
      raise InputError(
        f"{where}: the tokenizer's chat template writes {prompt.count(IMAGE_PLACEHOLDER)} <image>"
        f" for a turn with {turn.images}; {_MEND}"
      )
    if turn.answer is None:
      pairs.append((prompt, None))
      break
    messages.append(_message("assistant", turn.answer, 0, typed))
    answered = _render(messages, tokenizer, where, ask=False)
    if not answered.startswith(asked):
      raise InputError(f"{cannot}: an answer changes the prompt that it follows; {_MEND}")
    tail = answered[len(asked) :]
    if turn.answer not in tail:
      raise InputError(f"{where}: the tokenizer's chat template changes the answer's text; {_MEND}")
    end, closed = _answer_end(tail, turn.answer, control)
    answer = tail[:end]
    pairs.append((prompt, answer if closed else answer + tokenizer.eos_token))
    done = asked + answer
  return pairs


def _answer_end(tail: str, answer: str, control: re.Pattern) -> tuple[int, bool]:
  """Where in `tail` the answer ends, with its end token if there is one, and whether there is one.

  The template may put words before the answer, and those may contain the answer's: what an end
  token follows is the answer, else what closes the tail.
  """
  place = tail.find(answer)
  while place >= 0:
    end = place + len(answer)
    # Llama 2's own template has a space before </s>: the model must write it too.
    token = control.match(tail, len(tail) - len(tail[end:].lstrip()))
    if token:
      return token.end(), True
    place = tail.find(answer, place + 1)
  if tail.rstrip().endswith(answer):
    return len(tail.rstrip()), False
  return tail.index(answer) + len(answer), False


def takes_typed_content(tokenizer) -> bool:
  """Whether the chat template wants messages as lists of typed parts, and not as text.

  Raises:
    InputError: there is no chat template, or it is of no use either way.
  """
  if not tokenizer.chat_template:
    raise InputError(f"the tokenizer has no chat template for data.template auto; {_MEND}")
  return _takes_typed_content(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _takes_typed_content(tokenizer, template: str) -> bool:
  """Tries a conversation of known words, first as text."""
  del template  # only a part of the cache's key
  words = [IMAGE_PLACEHOLDER, "Mention alpha.", "Beta it is.", "Now gamma?"]
  failures = []
  for typed in (False, True):
    messages = [
      _message("user", words[1], 1, typed),
      _message("assistant", words[2], 0, typed),
      _message("user", words[3], 0, typed),
    ]
    try:
      text = _render(messages, tokenizer, "a trial conversation", ask=True)
    except InputError as error:
      failures.append(str(error.__cause__))
      continue
    places = [text.find(word) for word in words]
    if all(text.count(word) == 1 for word in words) and places == sorted(places):
      return typed
    failures.append("it loses or doubles a turn's text or its <image>")
  raise InputError(
    f"the tokenizer's chat template is of no use here (given text: {failures[0]}; given typed"
    f" parts: {failures[1]}); {_MEND}"
  )


def _message(role: str, text: str, images: int, typed: bool) -> dict:
  if not typed:
    return {"role": role, "content": f"{IMAGE_PLACEHOLDER}\n" * images + text}
  return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _render(messages: list[dict], tokenizer, where: str, ask: bool) -> str:
  try:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
  except Exception as error:  # a template is a program and fails as it likes
    raise InputError(f"{where}: the tokenizer's chat template fails: {error}; {_MEND}") from error
