"""A named prompt template as a chat template: exported models are prompted as they were trained."""

from vlalign_jax.data.templates import named_parts

# `content` may be a string with <image> in it, or a list of {"type": "image"} and "text" parts.
_CHAT_TEMPLATE = """
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
{%- if loop.first -%}
{{- FIRST -}}
{%- else -%}
{{- RESTART -}}
{%- endif -%}
{%- if ns.images -%}
{{- WITH_IMAGE -}}
{%- else -%}
{{- WITHOUT_IMAGE -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{- ANSWER + (ns.text | trim) + END -}}
{%- else -%}
{{- raise_exception('roles are user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
""".strip()


def _quote(text: str) -> str:
  escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
  return f"'{escaped}'"


def _wording(text: str, first_drops: str) -> str:
  """A Jinja expression for a turn's wording with `{images}` and `{question}` filled in."""
  expression = _quote(text)
  expression = expression.replace("{images}", "' + ns.images + '")
  expression = expression.replace("{question}", "' + (ns.text | trim) + '")
  if not first_drops:
    return f"({expression})"
  quoted = _quote(first_drops)
  return f"(({expression}).replace({quoted}, '', 1) if loop.first else {expression})"


def chat_template(template: str, tokenizer) -> str:
  """The Jinja text that renders conversations as the named template does.

  Every user message is followed by what stands before an answer, whether one follows or not.

  Args:
    template: one of `templates.TEMPLATES` but `auto`.
    tokenizer: whose end tokens are used.
  """
  parts = named_parts(template, tokenizer)
  fills = {
    "WITHOUT_IMAGE": _wording(parts.without_image, parts.first_drops),
    "WITH_IMAGE": _wording(parts.with_image, parts.first_drops),
    "FIRST": _quote(parts.system),
    "RESTART": _quote(parts.restart),
    "ANSWER": _quote(parts.answer),
    "END": _quote(parts.end),
  }
  text = _CHAT_TEMPLATE
  for name, expression in fills.items():
    text = text.replace(name, expression)
  return text
