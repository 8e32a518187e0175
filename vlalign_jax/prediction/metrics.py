"""How good generated answers are, against reference answers."""

from collections.abc import Sequence

import numpy as np


def normalised(text: str) -> str:
  """The text with every run of whitespace as one space, none at its ends."""
  return " ".join(text.split())


def exact_match(answer: str, reference: str) -> bool:
  """Whether two answers are the same but for whitespace."""
  return normalised(answer) == normalised(reference)


def summarise(lines: list[dict]) -> dict[str, float | int]:
  """What metrics.json says of the lines of mode `generate`."""
  answered = [line for line in lines if line["answer"] is not None]
  records = {line["record"] for line in lines}
  found: dict[str, float | int] = {"records": len(records), "answers": len(answered)}
  unanswered = len(records) - len({line["record"] for line in answered})
  found["unanswered"] = unanswered
  if not answered:
    return found
  found["mean_tokens"] = float(np.mean([line["num_tokens"] for line in answered]))
  found["ended"] = float(np.mean([line["ended"] for line in answered]))
  compared = [line for line in answered if line["reference"] is not None]
  if compared:
    found["exact_match"] = _mean(
      [exact_match(line["answer"], line["reference"]) for line in compared]
    )
  return found


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values))
