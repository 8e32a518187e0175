"""Multiple choice: the options of a question, and which of them an answer chooses.

As ScienceQA has it: the question lists options such as "(A) yes" or "B. no", and an answer names
the letter ("B", "The answer is B: no") or says the option's text.
"""

import re

_IN_BRACKETS = re.compile(r"\(([A-Z])\)[ \t]*")
_ON_LINES = re.compile(r"^[ \t]*([A-Z])[.):][ \t]+", re.MULTILINE)
_FIRST = re.compile(r"\(?([A-Z])(?:\)|[.:,;](?=\s|$)|$)")
_NAMED = re.compile(
  r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])(?=[).:,;]|\s*$)",
  re.IGNORECASE | re.MULTILINE,
)


def options(question: str) -> dict[str, str]:
  """Letter -> text of the options that a question lists, A first; empty if it lists none."""
  for marks in (_IN_BRACKETS, _ON_LINES):
    runs: list[list[re.Match]] = []
    for mark in marks.finditer(question):
      if mark[1] == "A":
        runs.append([mark])
      elif runs and ord(mark[1]) == ord(runs[-1][-1][1]) + 1:
        runs[-1].append(mark)
    # The question itself may speak of (A) and (B), too.
    run = max(reversed(runs), key=len, default=[])
    if len(run) > 1:
      return _texts(question, run)
  return {}


def _texts(question: str, run: list[re.Match]) -> dict[str, str]:
  ends = [*(mark.start() for mark in run[1:]), len(question)]
  texts = (question[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True))
  # Behind the last option the question may go on in the next line.
  return {mark[1]: text.split("\n")[0].strip() for mark, text in zip(run, texts, strict=True)}


def choice(answer: str, given: dict[str, str]) -> str | None:
  """The letter that an answer chooses.

  Args:
    answer: the text.
    given: of `options`.

  Returns:
    The option that it names by its letter, or else the one whose text it is, or else the only one
    whose text is in it (of texts that contain each other the longest); None if there is none.
  """
  answer = answer.strip()
  for pattern in (_FIRST.match(answer), _NAMED.search(answer)):
    if pattern and pattern[1].upper() in given:
      return pattern[1].upper()
  plain = _plain(answer)
  texts = {letter: _plain(text) for letter, text in given.items() if _plain(text)}
  same = [letter for letter, text in texts.items() if text == plain]
  if same:
    return same[0]
  inside = {
    letter: text
    for letter, text in texts.items()
    if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)
  }
  longest = [
    letter
    for letter, text in inside.items()
    if not any(text != other and text in other for other in inside.values())
  ]
  return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
  return " ".join(text.lower().split()).rstrip(".")
