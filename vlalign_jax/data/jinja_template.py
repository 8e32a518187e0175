"""A named prompt template as a chat template: exported models are prompted as they were trained."""

import re

from vlalign_jax.data.chat_template import CleanTurn, cut_conversation, takes_typed_content
from vlalign_jax.data.records import IMAGE_PLACEHOLDER, Turn
from vlalign_jax.data.templates import closing, named_parts, turn_pieces
from vlalign_jax.data.tokens import tokenize_pieces, vocabulary
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
{{- SYSTEM -}}
{%- else -%}
{{- RESTART -}}
{%- endif -%}
{%- if ns.images -%}
{{- WITH_IMAGE -}}
{%- else -%}
{{- WITHOUT_IMAGE -}}
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


def _quote(text: str) -> str:
  escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
  return f"'{escaped}'"


def _wording(text: str, first_drops: str) -> str:
  """Returns a Jinja expression with `{images}`, `{question}` and `{system}` filled in."""
  expression = _quote(text)
  expression = expression.replace("{images}", "' + ns.images + '")
  expression = expression.replace("{question}", "' + (ns.text | trim) + '")
  expression = expression.replace("{system}", "' + start.system + '")
  if not first_drops:
    return f"({expression})"
  quoted = _quote(first_drops)
  return f"(({expression}).replace({quoted}, '', 1) if start.first else {expression})"


# What training writes behind an answer to which the tokenizer's own template puts no end token.
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
  """Returns the Jinja text that renders conversations as training did, bos included.

  Servers tokenize what it renders without adding special tokens, and get the ids of training. A
  system message takes the place of the template's own. Every user message is followed by what
  stands before an answer, whether one follows or not.

  Args:
    template: one of `templates.TEMPLATES`; `auto` is the tokenizer's chat template, with a bos and
      end tokens where training has them and it has none.
    tokenizer: whose bos and end tokens are used.
  """
  if template == "auto":
    return _auto(tokenizer)
  parts = named_parts(template, tokenizer)
  only = "" if parts.system else "; the template plain takes no system message"
  fills = {
    "WITHOUT_IMAGE": _wording(parts.without_image, parts.first_drops),
    "WITH_IMAGE": _wording(parts.with_image, parts.first_drops),
    "BOS": _quote(_bos(template, tokenizer)),
    "DEFAULT": _quote(parts.default_system),
    "TAKES_SYSTEM": "true" if parts.system else "false",
    "SYSTEM": _wording(parts.system, ""),
    "RESTART": _quote(parts.restart),
    "ANSWER": _quote(parts.answer),
    "END": _quote(parts.end),
    "CLOSING": _quote(closing(template, tokenizer)),
    "REFUSAL": _quote(f"roles are user, assistant and, first, system{only}; not "),
  }
  names = re.compile("|".join(rf"\b{name}\b" for name in fills))
  return names.sub(lambda match: fills[match[0]], _CHAT_TEMPLATE)


def _auto(tokenizer) -> str:
  """Returns the tokenizer's chat template with the bos and the end tokens of training."""
  text = tokenizer.chat_template
  answered = [CleanTurn("question", 0, "answer"), CleanTurn("again", 0, None)]
  where = "a trial conversation"
  pairs = cut_conversation(answered, tokenizer, where)
  eos = tokenizer.eos_token
  # The cut adds the eos to the answer where the template, which goes on with the prompt, does not.
  messages = [("user", "question"), ("assistant", "answer"), ("user", "again")]
  rendered = _rendered(messages, tokenizer)
  if rendered != "".join(part for pair in pairs for part in pair if part):
    text = _CLOSE_ANSWERS.replace("EOS", _quote(eos)) + text
  bos = _bos("auto", tokenizer)
  return "{{- " + _quote(bos) + " -}}" + text if bos else text


def _rendered(messages, tokenizer) -> str:
  typed = takes_typed_content(tokenizer)
  wrap = (lambda text: [{"type": "text", "text": text}]) if typed else str
  content = [{"role": role, "content": wrap(text)} for role, text in messages]
  return tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)


def _bos(template: str, tokenizer) -> str:
  """Returns what has to stand before the first prompt so that its ids are those of training.

  Raises:
    InputError: no text has these ids.
  """
  image = f"{IMAGE_PLACEHOLDER}\n" if template == "plain" else ""
  turns = [Turn(f"{image}question", None)]
  prompt = turn_pieces(turns, template, tokenizer, "a trial conversation")[0].text
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
