"""Converts published preference data sets to LLaVA records whose last answer is a ranked list.

- LLaVA-Human-Preference-10K (llava_7b_v1_preference.json): `output_1` and `output_2` replace the
  last answer of `conversations`; `preference` (1 or 2) names the better one.
- RLAIF-V: `question`, `chosen`, `rejected`, `image` or `image_path`.
- vision-feedback-mix-binarized: the last message of `conversations` (a list, or its JSON as text)
  has `preference_values`: the better answer, then the worse.
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
  """Converts a file in one of the layouts above; whether its images exist is not checked.

  Args:
    path: a JSON array, or JSON lines if it ends with .jsonl or .ndjson.

  Returns:
    (records for reward models and DPO, an error for every bad entry), both in file order.

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
  if len(messages) % 2 == 0:  # a reference answer, which both outputs replace
    messages = messages[:-1]
  return [*messages, {"from": "gpt", "value": outputs}]


def _feedback_mix(entry: dict[str, Any]) -> list[Any]:
  *messages, last = _messages(entry)
  if not isinstance(last, dict) or "preference_values" not in last:
    raise InputError(_LAYOUTS)
  return [*messages, {"from": last.get("from"), "value": last["preference_values"]}]


def _pair(entry: dict[str, Any]) -> list[Any]:
  conversation = parse(entry, "ranked", None)
  messages = []
  for turn in conversation.turns:
    messages.append({"from": "human", "value": turn.human})
    messages.append({"from": "gpt", "value": turn.gpt})
  messages[-1]["value"] = list(conversation.answers)
  return messages


def _messages(entry: dict[str, Any]) -> list[Any]:
  """Returns the conversation, also from JSON as text, or from a list of one conversation."""
  messages = entry.get("conversations")
  if isinstance(messages, str):
    try:
      messages = json.loads(messages)
    except (ValueError, RecursionError) as error:
      raise InputError(f'"conversations" holds malformed JSON ({error}); fix it') from error
  if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
    messages = messages[0]
  if not isinstance(messages, list) or not messages:
    raise InputError('"conversations" must be a list of human and gpt messages; give it')
  return messages


def _path(image: Any) -> Any:
  """Unwraps the path in an object that `datasets` writes; returns anything else unchanged."""
  return image.get("path") if isinstance(image, dict) and not image.get("bytes") else image


def _image(entry: dict[str, Any]) -> Any:
  """Returns the image's path, or a list of paths, or None."""
  image = entry.get("image") or entry.get("images")
  image = [_path(item) for item in image] if isinstance(image, list) else _path(image)
  if isinstance(image, list) and any(isinstance(item, dict) for item in image):
    raise InputError('"images" has a picture, not its path; save it as a file and give the path')
  if isinstance(image, dict) or image is None:
    path = entry.get("image_path")
    if image is not None and not path:
      raise InputError('"image" is a picture, not its path; save it as a file and give the path')
    return path or None
  return image
