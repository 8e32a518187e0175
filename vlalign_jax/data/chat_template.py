"""The template `auto`: cuts what the tokenizer's chat template renders into prompts and answers."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER
from vlalign_jax.data.tokens import picture_token, vocabulary
from vlalign_jax.errors import InputError

TRIAL = "a trial conversation"  # its name in errors
_FIX = "choose another data.template"


class CleanTurn(NamedTuple):
  """A turn as templates take it; its texts are stripped and cannot write control tokens."""

  question: str  # without placeholders
  images: int  # number of placeholders it had
  answer: str | None  # None if it is to be generated


def cut_conversation(
  turns: Sequence[CleanTurn], tokenizer, where: str, system: str | None = None
) -> list[tuple[str, str | None]]:
  """Renders the conversation's prefixes and cuts where the answers begin and end.

  An answer is learned with the end token that the template writes after it, or with the
  tokenizer's eos if it writes none. Other text after an answer begins the next prompt; after the
  last answer it is dropped.

  Args:
    turns: the conversation; only the last turn may lack its answer.
    tokenizer: a tokenizer with a chat template.
    where: names the record in error messages.
    system: the text of a first message of the system, stripped; None: there is none.

  Returns:
    For each turn its prompt and its answer with the end token (None if there is no answer).

  Raises:
    InputError: there is no chat template, it fails, or it rewrites earlier text when a message is
      added.
  """
  typed = takes_typed_content(tokenizer)
  control = vocabulary(tokenizer).control
  cannot = f"{where}: the tokenizer's chat template can't be cut at turn boundaries"
  messages, pairs, done = [], [], ""
  if system is not None:
    messages.append(_message("system", system, 0, typed))
  for turn in turns:
    messages.append(_message("user", turn.question, turn.images, typed))
    asked = _render(messages, tokenizer, where, ask=True)
    if not asked.startswith(done):
      raise InputError(f"{cannot}: a new question changes the text before it; {_FIX}")
    prompt = asked[len(done) :]
    if system is not None and not pairs and system not in prompt:
      raise InputError(f"{where}: the chat template leaves out the record's system text; {_FIX}")
    if prompt.count(IMAGE_PLACEHOLDER) != turn.images:
      raise InputError(
        f"{where}: the tokenizer's chat template writes {prompt.count(IMAGE_PLACEHOLDER)} <image>"
        f" for a turn with {turn.images}; {_FIX}"
      )
    if turn.answer is None:
      pairs.append((prompt, None))
      break
    messages.append(_message("assistant", turn.answer, 0, typed))
    answered = _render(messages, tokenizer, where, ask=False)
    if not answered.startswith(asked):
      raise InputError(f"{cannot}: an answer changes the prompt before it; {_FIX}")
    tail = answered[len(asked) :]
    if turn.answer not in tail:
      raise InputError(f"{where}: the tokenizer's chat template changes the answer's text; {_FIX}")
    end, closed = _answer_end(tail, turn.answer, control)
    answer = tail[:end]
    pairs.append((prompt, answer if closed else answer + tokenizer.eos_token))
    done = asked + answer
  return pairs


def _answer_end(tail: str, answer: str, control: re.Pattern) -> tuple[int, bool]:
  """Returns where in `tail` the answer and its end token end, and whether there is an end token.

  The template may put words before the answer, and they may contain the answer's text. The answer
  is the occurrence before an end token, else the one that closes the tail.
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


def writes_end_tokens(tokenizer) -> bool:
  """Returns whether the chat template itself writes an end token after an answer."""
  turns = [CleanTurn("question", 0, "answer"), CleanTurn("again", 0, None)]
  pieces = [piece for pair in cut_conversation(turns, tokenizer, TRIAL) for piece in pair if piece]
  typed = takes_typed_content(tokenizer)
  texts = (("user", "question"), ("assistant", "answer"), ("user", "again"))
  messages = [_message(role, text, 0, typed) for role, text in texts]
  return _render(messages, tokenizer, TRIAL, ask=True) == "".join(pieces)


def takes_typed_content(tokenizer) -> bool:
  """Returns whether the chat template takes messages as lists of typed parts, not as text.

  Raises:
    InputError: there is no chat template, or it can use neither.
  """
  if not tokenizer.chat_template:
    raise InputError(f"the tokenizer has no chat template for data.template auto; {_FIX}")
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
      text = _render(messages, tokenizer, TRIAL, ask=True)
    except InputError as error:
      failures.append(str(error.__cause__))
      continue
    places = [text.find(word) for word in words]
    if all(text.count(word) == 1 for word in words) and places == sorted(places):
      return typed
    failures.append("it loses or doubles a turn's text or its <image>")
  raise InputError(
    f"the tokenizer's chat template cannot be used (with text: {failures[0]}; with typed parts:"
    f" {failures[1]}); {_FIX}"
  )


def _message(role: str, text: str, images: int, typed: bool) -> dict:
  if not typed:
    return {"role": role, "content": f"{IMAGE_PLACEHOLDER}\n" * images + text}
  return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _render(messages: list[dict], tokenizer, where: str, ask: bool) -> str:
  try:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return text.replace(picture_token(tokenizer), IMAGE_PLACEHOLDER)
  except Exception as error:  # a template is a program and may raise anything
    raise InputError(f"{where}: the tokenizer's chat template fails: {error}; {_FIX}") from error
