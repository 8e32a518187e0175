"""Reward functions for tests."""


def length(prompt, answer, reference, record):
  """Longer answers are better; looks at all that it is given."""
  assert record["turns"][-1][0] == prompt
  assert record["turns"][-1][1] == reference
  assert isinstance(record["id"], str)
  return float(len(answer))


def by_column(prompt, answer, reference, record):
  """The number in the record's own column, for any answer."""
  del prompt, answer, reference
  return record["solution"]["score"] + len(record["images"])


def never(prompt, answer, reference, record):
  """No number at all."""
  del prompt, answer, reference, record
  return float("nan")


def some(prompt, answer, reference, record):
  """A number for some answers."""
  del prompt, reference, record
  return len(answer) / 10 if len(answer) % 2 else float("nan")


def until(prompt, answer, reference, record, left=[6]):  # noqa: B006
  """Fails at the seventh answer."""
  del prompt, reference, record
  left[0] -= 1
  if left[0] < 0:
    raise ConnectionError("the judge does not answer")
  return float(len(answer))


def fails(prompt, answer, reference, record):
  """A mistake of the user."""
  return {}[answer]
