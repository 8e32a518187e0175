"""Prompt templates: they cut a conversation into pieces of text, prompts and answers in turn."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlalign_jax.data.chat_template import TRIAL, CleanTurn, cut_conversation, takes_typed_content
from vlalign_jax.data.conversations import IMAGE_PLACEHOLDER, Turn
from vlalign_jax.data.tokens import plain_text, vocabulary
from vlalign_jax.errors import InputError


@dataclass(frozen=True)
class Piece:
  """A prompt or an answer; `tokens.CUT` breaks up users' words that look like control tokens."""

  text: str
  learn: bool


@dataclass(frozen=True)
class Template:
  """The texts of a named template; `{images}` stands for one `<image>` line per image."""

  system: str  # around the system message: {system}
  with_image: str
  without_image: str
  answer: str  # the space, if any, before an answer; it is learned with the answer
  end: str = ""  # the literal after an answer; empty: the tokenizer's eos
  restart: str = ""  # the literal between that end and the next turn
  first_drops: str = ""  # what the first turn leaves out because the system text has it
  needs: tuple[str, ...] = ()  # tokens that the tokenizer must have
  default_system: str = ""  # the system message of training

  def prompt(self, first: bool, has_images: bool) -> str:
    """Returns the text before an answer, with {system} (in a first turn), {images}, {question}."""
    wording = self.with_image if has_images else self.without_image
    if first:
      return self.system + wording.replace(self.first_drops, "", 1)
    return self.restart + wording


_SYSTEM = (
  "You are a helpful language and vision assistant. You are able to understand the visual content"
  " that the user provides, and assist the user with a variety of tasks using natural language."
)
_CHAT = (
  "A chat between a curious {user} and an artificial intelligence assistant. The assistant gives"
  " helpful, detailed, and polite answers to the {user}'s questions."
)
_LLAMA_3_TURN = (
  "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
  "<|start_header_id|>assistant<|end_header_id|>\n\n"
)

_TEMPLATES = {
  "default": Template(
    system="{system}\n\n",
    default_system=_SYSTEM,
    with_image="### Image:\n{images}\n### Question:\n{question}\n\n### Answer:\n",
    without_image="### Question:\n{question}\n\n### Answer:\n",
    answer="",
  ),
  "llama_2": Template(
    system="[INST] <<SYS>>\n{system}\n\n\n<</SYS>>\n\n",
    default_system=_SYSTEM,
    with_image="### Image:\n{images}\n[INST] {question} [/INST]",
    without_image="[INST] {question} [/INST]",
    answer=" ",
    end="</s>",
    restart="<s>",
    first_drops="[INST] ",
  ),
  "llama_3": Template(
    system="<|start_header_id|>system<|end_header_id|>\n\n{system}\n\n<|eot_id|>",
    default_system=_SYSTEM,
    with_image="### Image:\n{images}\n" + _LLAMA_3_TURN,
    without_image=_LLAMA_3_TURN,
    answer="",
    end="<|eot_id|>",
    needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  ),
  "vicuna": Template(
    system="{system} ",
    default_system=_CHAT.format(user="user"),
    with_image="USER: {images}{question} ASSISTANT:",
    without_image="USER: {question} ASSISTANT:",
    answer=" ",
    end="</s>",
  ),
  "llava": Template(
    system="{system} ",
    default_system=_CHAT.format(user="human"),
    with_image="USER: {images}{question} ASSISTANT:",
    without_image="USER: {question} ASSISTANT:",
    answer=" ",
  ),
  # LLaVA's pretraining: the caption follows the image, whatever the question says.
  "plain": Template(system="", with_image="{images}", without_image="", answer=""),
}

TEMPLATES = (*_TEMPLATES, "auto")


def turn_pieces(
  turns: Sequence[Turn], template: str, tokenizer, where: str, system: str | None = None
) -> list[Piece]:
  """Returns two pieces per turn: the prompt up to the answer, and the answer with its end token.

  The pieces of a turn do not depend on the turns after it. If the last turn has no answer, the
  last piece is its prompt.

  Args:
    turns: the conversation, with `<image>` in the human texts.
    template: one of `TEMPLATES`.
    tokenizer: a fast Hugging Face tokenizer; `auto` uses its chat template.
    where: names the record in error messages.
    system: the text in place of the template's own system text; None: the template's.

  Raises:
    InputError: the template is unknown, the tokenizer lacks its tokens, or the conversation does
      not fit it.
  """
  check_template(template, tokenizer)
  for number, turn in enumerate(turns[:-1], start=1):
    if turn.gpt is None:
      raise InputError(f"{where}: turn {number} of {len(turns)} has no answer; give it one")
  if template == "plain" and (len(turns) != 1 or IMAGE_PLACEHOLDER not in turns[0].human):
    raise InputError(
      f"{where}: the template plain takes one turn with at least one image; remove the record or"
      " choose another data.template"
    )
  clean = [_clean(turn, tokenizer) for turn in turns]
  system = None if system is None else plain_text(system.strip(), tokenizer)
  if template == "auto":
    pairs = cut_conversation(clean, tokenizer, where, system)
  else:
    parts = named_parts(template, tokenizer)
    if system is not None and not parts.system:
      raise InputError(
        f"{where}: the template {template} has no place for the record's system text; remove it or"
        " choose another data.template"
      )
    pairs = _fill(clean, parts, parts.default_system if system is None else system)
  texts = [text for pair in pairs for text in pair if text is not None]
  return [Piece(text, learn=number % 2 == 1) for number, text in enumerate(texts)]


def trial_pieces(template: str, tokenizer) -> list[Piece]:
  """Returns the pieces of a conversation that asks "question" and answers "answer"."""
  image = f"{IMAGE_PLACEHOLDER}\n" if template == "plain" else ""
  return turn_pieces([Turn(f"{image}question", "answer")], template, tokenizer, TRIAL)


def closing(template: str, tokenizer) -> str:
  """Returns what follows the last answer's end token: the eos, or "" if that token is the eos."""
  if template == "auto":
    return ""  # the tokenizer's chat template knows best
  literal = _TEMPLATES[template].end
  eos = tokenizer.eos_token
  return "" if not literal or _literal(literal, eos, tokenizer) == eos else eos


def end_tokens(template: str, tokenizer) -> tuple[int, ...]:
  """Returns the ids that end an answer in training: the template's end token and the eos.

  Raises:
    InputError: the template does not suit the tokenizer.
  """
  end = trial_pieces(template, tokenizer)[-1].text.rpartition("answer")[2]
  special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
  written = [token for token in vocabulary(tokenizer).ids(end) if token in special]
  return tuple(sorted({*written[:1], tokenizer.eos_token_id}))


def render(
  turns: Sequence[Turn], template: str, tokenizer, where: str, system: str | None = None
) -> list[Piece]:
  """Returns the `turn_pieces` of a whole example, with its final eos.

  Raises:
    InputError: a turn has no answer, or as for `turn_pieces`.
  """
  if turns[-1].gpt is None:
    raise InputError(f"{where}: the last turn has no answer to learn; give it one")
  *pieces, last = turn_pieces(turns, template, tokenizer, where, system)
  return [*pieces, replace(last, text=last.text + closing(template, tokenizer))]


def check_template(template: str, tokenizer) -> None:
  """Raises an InputError unless the template is known and the tokenizer has its tokens."""
  if template not in TEMPLATES:
    near = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise InputError(f'data.template "{template}" is not one of {", ".join(TEMPLATES)}{hint}')
  if tokenizer.eos_token is None:
    raise InputError("the tokenizer has no eos token; set eos_token in its tokenizer_config.json")
  if template == "auto":
    takes_typed_content(tokenizer)
    return
  added = vocabulary(tokenizer).added
  missing = [token for token in _TEMPLATES[template].needs if token not in added]
  if missing:
    raise InputError(
      f"data.template {template} needs {', '.join(missing)}, which the tokenizer lacks; choose"
      " another data.template"
    )


def named_parts(template: str, tokenizer) -> Template:
  """Returns a named template whose end and restart are tokens of this tokenizer."""
  parts, eos = _TEMPLATES[template], tokenizer.eos_token
  end = _literal(parts.end, eos, tokenizer) if parts.end else eos
  restart = _literal(parts.restart, tokenizer.bos_token, tokenizer) if parts.restart else ""
  return replace(parts, end=end, restart=restart)


def _clean(turn: Turn, tokenizer) -> CleanTurn:
  question = plain_text(turn.human.replace(IMAGE_PLACEHOLDER, "").strip(), tokenizer)
  answer = None if turn.gpt is None else plain_text(turn.gpt.strip(), tokenizer)
  return CleanTurn(question, turn.human.count(IMAGE_PLACEHOLDER), answer)


def _literal(literal: str, fallback: str | None, tokenizer) -> str:
  return literal if literal in vocabulary(tokenizer).added else fallback or ""


def _fill(turns: list[CleanTurn], template: Template, system: str) -> list[tuple[str, str | None]]:
  pairs = []
  for number, turn in enumerate(turns):
    prompt = template.prompt(number == 0, turn.images > 0).format(
      system=system,
      images=f"{IMAGE_PLACEHOLDER}\n" * turn.images,
      question=turn.question,
    )
    answer = None if turn.answer is None else template.answer + turn.answer + template.end
    pairs.append((prompt, answer))
  return pairs
