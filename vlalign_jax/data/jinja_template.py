"""Prompt templates as Jinja chat templates: servers prompt an exported model as in training."""

import re

from vlalign_jax.data.chat_template import writes_end_tokens
from vlalign_jax.data.templates import closing, named_parts, trial_pieces
from vlalign_jax.data.tokens import picture_token, tokenize_pieces, vocabulary
from vlalign_jax.errors import InputError

# `content` may be a string with <image> in it, or a list of {"type": "image"} and "text" parts.
_CHAT_TEMPLATE = """
{{- BOS -}}
{%- set start = namespace(first=true, system=DEFAULT) -%}
{%- for message in messages -%}
{%- set ns = namespace(images='', text='') -%}
{%- if message['content'] is string -%}
{%- set ns.images = '<image>\\n' * message['content'].count('<image>') -%}
{%- set ns.text = message['content'].replace('<image>', '') -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set ns.images = ns.images + '<image>\\n' -%}
{%- else -%}
{%- set ns.text = ns.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- if start.first -%}
{{- FIRST_WITH_IMAGE if ns.images else FIRST -}}
{%- else -%}
{{- NEXT_WITH_IMAGE if ns.images else NEXT -}}
{%- endif -%}
{%- set start.first = false -%}
{%- elif message['role'] == 'assistant' -%}
{{- ANSWER + (ns.text | trim) + END -}}
{%- if loop.last -%}
{{- CLOSING -}}
{%- endif -%}
{%- elif message['role'] == 'system' and loop.first and TAKES_SYSTEM -%}
{%- set start.system = ns.text | trim -%}
{%- else -%}
{{- raise_exception(REFUSAL + message['role']) -}}
{%- endif -%}
{%- endfor -%}
""".strip()


# Appends the eos to answers, for a tokenizer's own template that writes no end token after them.
_CLOSE_ANSWERS = """
{%- set closed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['role'] != 'assistant' -%}
{%- set closed.messages = closed.messages + [message] -%}
{%- elif message['content'] is string -%}
{%- set text = (message['content'] | trim) + EOS -%}
{%- set closed.messages = closed.messages + [dict(message, content=text)] -%}
{%- else -%}
{%- set parts = message['content'] + [{'type': 'text', 'text': EOS}] -%}
{%- set closed.messages = closed.messages + [dict(message, content=parts)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = closed.messages -%}
""".strip()


def chat_template(template: str, tokenizer) -> str:
  """Returns the Jinja text that renders conversations as training does, bos included.

  Servers tokenize its output without adding special tokens, and get the ids of training. A system
  message replaces the template's own. Every user message is followed by what stands before an
  answer, even if no answer follows.

  Args:
    template: one of `templates.TEMPLATES`. `auto` is the tokenizer's chat template; the bos and
      end tokens of training are added if it lacks them.
    tokenizer: its bos and end tokens are used.
  """
  bos = _bos(template, tokenizer)
  if template == "auto":
    text = str(tokenizer.chat_template)
    if not writes_end_tokens(tokenizer):
      text = _CLOSE_ANSWERS.replace("EOS", _quote(tokenizer.eos_token)) + text
    return "{{- " + _quote(bos) + " -}}" + text if bos else text
  parts = named_parts(template, tokenizer)
  only = "" if parts.system else "; the template plain takes no system message"
  fills = {
    "FIRST_WITH_IMAGE": _expression(parts.prompt(first=True, has_images=True)),
    "FIRST": _expression(parts.prompt(first=True, has_images=False)),
    "NEXT_WITH_IMAGE": _expression(parts.prompt(first=False, has_images=True)),
    "NEXT": _expression(parts.prompt(first=False, has_images=False)),
    "BOS": _quote(bos),
    "DEFAULT": _quote(parts.default_system),
    "TAKES_SYSTEM": "true" if parts.system else "false",
    "ANSWER": _quote(parts.answer),
    "END": _quote(parts.end),
    "CLOSING": _quote(closing(template, tokenizer)),
    "REFUSAL": _quote(f"roles are user, assistant and, first, system{only}; not "),
  }
  names = re.compile("|".join(rf"\b{name}\b" for name in fills))
  text = _CHAT_TEMPLATE.replace("'<image>\\n'", _quote(f"{picture_token(tokenizer)}\n"))
  return names.sub(lambda match: fills[match[0]], text)


def _quote(text: str) -> str:
  escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
  return f"'{escaped}'"


def _expression(wording: str) -> str:
  """Returns a Jinja expression that fills in `{images}`, `{question}` and `{system}`."""
  expression = _quote(wording)
  expression = expression.replace("{images}", "' + ns.images + '")
  expression = expression.replace("{question}", "' + (ns.text | trim) + '")
  expression = expression.replace("{system}", "' + start.system + '")
  return f"({expression})"


def _bos(template: str, tokenizer) -> str:
  """Returns the text to put before the first prompt so that its ids are those of training.

  Raises:
    InputError: no text has these ids.
  """
  prompt = trial_pieces(template, tokenizer)[0].text
  words = vocabulary(tokenizer)
  expected = tokenize_pieces([prompt], tokenizer)[0].tolist()
  bos = "".join(tokenizer.convert_ids_to_tokens(words.prefix))
  # A tokenizer that puts a space before a text, but not after a special token, needs it written.
  for before in ("", bos, f"{bos} "):
    if words.ids(before + prompt) == expected:
      return before
  raise InputError(
    f"the tokenizer has no text for what it puts before a prompt ({bos!r}); choose another one"
  )
