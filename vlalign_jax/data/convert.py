"""Published preference data sets, as LLaVA records whose last answer is a ranked list.

- LLaVA-Human-Preference-10K (llava_7b_v1_preference.json): `conversations`, whose last answer gives
  way to `output_1` and `output_2`, the better of which `preference` (1 or 2) names.
- RLAIF-V: `question`, `chosen`, `rejected`, `image` or `image_path`.
- vision-feedback-mix-binarized: `conversations`, also as a text of JSON, whose last message has
  `preference_values`: the better answer, then the worse.
"""

import json
from typing import Any

from vlalign_jax.data.conversations import parse
from vlalign_jax.data.json_entries import as_text, entries, kind, quote
from vlalign_jax.data.records import parse_record
from vlalign_jax.errors import InputError

_LAYOUTS = (
  'it has neither "output_1" (LLaVA-Human-Preference-10K), nor "preference_values"'
  ' (vision-feedback-mix-binarized), nor "chosen" (RLAIF-V); give one of these'
)
_PARQUET = (
  "holds no JSON; with pip install datasets pillow, load_dataset gives its rows: save each row's"
  ' picture as a file, put its path in "image", and write the rows as JSON lines'
)


def convert(path: str) -> tuple[list[dict[str, Any]], list[InputError]]:
  """Reads a file in one of the layouts above.

  Args:
    path: a JSON array, or JSON lines if it ends with .jsonl or .ndjson.

  Returns:
    (records that preference stages read; an error for every other), in file order. Pictures are
    not looked for.

  Raises:
    InputError: the file as a whole is unusable.
  """
  if path.lower().endswith((".parquet", ".arrow")):
    raise InputError(f"{path}: {_PARQUET}")
  records, errors = [], []
  for index, entry in entries(path):
    try:
      if isinstance(entry, InputError):
        raise entry
      record = _converted(entry, path, index)
      parse_record(record, path, index, "ranked", None)
      records.append(record)
    except InputError as error:
      errors.append(error)
  return records, errors


def _converted(entry: Any, path: str, index: int) -> dict[str, Any]:
  try:
    if not isinstance(entry, dict):
      raise InputError(f"is {kind(entry)}, not an object")
    if "output_1" in entry:
      messages = _human_preference(entry)
    elif "conversations" in entry:
      messages = _feedback_mix(entry)
    elif "chosen" in entry:
      messages = _pair(entry)
    else:
      raise InputError(_LAYOUTS)
    identity = next((entry[key] for key in ("id", "idx") if entry.get(key) is not None), None)
    record = {} if identity is None else {"id": identity}
    image = _image(entry)
    return record | ({} if image is None else {"image": image}) | {"conversations": messages}
  except InputError as error:
    raise InputError(f"{path}, entry {index}: {error}") from error


def _human_preference(entry: dict[str, Any]) -> list[Any]:
  messages = _messages(entry)
  outputs = []
  for key in ("output_1", "output_2"):
    output = entry.get(key)
    output = output.get("value") if isinstance(output, dict) else output
    outputs.append(as_text(output, f'"{key}"'))
  if entry.get("preference") not in (1, 2):
    raise InputError(f'"preference" is {quote(entry.get("preference"))}; it must be 1 or 2')
  if entry["preference"] == 2:
    outputs.reverse()
  if len(messages) % 2 == 0:  # the answer that both were to be measured by
    messages = messages[:-1]
  return [*messages, {"from": "gpt", "value": outputs}]


def _feedback_mix(entry: dict[str, Any]) -> list[Any]:
  *messages, last = _messages(entry)
  if not isinstance(last, dict) or "preference_values" not in last:
    raise InputError(_LAYOUTS)
  return [*messages, {"from": last.get("from"), "value": last["preference_values"]}]


def _pair(entry: dict[str, Any]) -> list[Any]:
  found = parse(entry, "ranked", None)
  messages = []
  for turn in found.turns:
    messages.append({"from": "human", "value": turn.human})
    messages.append({"from": "gpt", "value": turn.gpt})
  messages[-1]["value"] = list(found.answers)
  return messages


def _messages(entry: dict[str, Any]) -> list[Any]:
  """The conversation, unwrapped from a text of JSON, and from a list that holds nothing else."""
  messages = entry.get("conversations")
  if isinstance(messages, str):
    try:
      messages = json.loads(messages)
    except (ValueError, RecursionError) as error:
      raise InputError(f'"conversations" holds malformed JSON ({error}); mend it') from error
  if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
    messages = messages[0]
  if not isinstance(messages, list) or not messages:
    raise InputError('"conversations" must be a list of human and gpt messages; give it')
  return messages


def _path(found: Any) -> Any:
  """A picture's path as `datasets` writes it; a picture itself, or a path, as it is."""
  return found.get("path") if isinstance(found, dict) and not found.get("bytes") else found


def _image(entry: dict[str, Any]) -> Any:
  """The picture's path, or list of paths; None where there is none."""
  found = entry.get("image") or entry.get("images")
  found = [_path(one) for one in found] if isinstance(found, list) else _path(found)
  if isinstance(found, list) and any(isinstance(one, dict) for one in found):
    raise InputError('"images" has a picture, not its path; save it as a file and give the path')
  if isinstance(found, dict) or found is None:
    path = entry.get("image_path")
    if found is not None and not path:
      raise InputError('"image" is a picture, not its path; save it as a file and give the path')
    return path or None
  return found
