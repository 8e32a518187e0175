"""Multiple choice: the options of a question, and the option that an answer chooses.

As in ScienceQA, a question lists options such as "(A) yes" or "B. no", and an answer names the
letter ("B", "The answer is B: no") or repeats the option's text.
"""

import re

_MARKS = (
  re.compile(r"\(([A-Z])\)[ \t]*"),
  re.compile(r"^[ \t]*([A-Z])[.):][ \t]*", re.MULTILINE),
  re.compile(r"\(([a-z])\)[ \t]*"),
)
_HEADING = re.compile(r"\b(?:options|choices)[ \t]*:", re.IGNORECASE)

# Ways to name a letter, the surest first. "A" and "I" before a space may be words.
_ALONE = re.compile(r"\(?([A-Za-z])\)?\.?$")
_FIRST = re.compile(r"\(?([A-Z])(?:\)|[.:,;](?=\s|$)|$)", re.MULTILINE)
_NAMED = re.compile(
  r"\b(?i:answer|option|choice)(?:\s+(?i:is))?\s*:?\s*\(?([A-Za-z](?=[).:,;]|\s*$)|[B-HJ-Z](?=\s))",
  re.MULTILINE,
)
_BEFORE_WORDS = re.compile(r"([B-HJ-Z])(?=\s)")
_ANYWHERE = re.compile(
  r"(?<!\w)(?:\(([A-Z])\)|([B-HJ-Z])(?![\w'])|(A)(?=[.,;:]?\s*$))", re.MULTILINE
)


def options(question: str) -> dict[str, str]:
  """Returns letter -> text of the options that a question lists, A first; empty if none."""
  heading = max((match.end() for match in _HEADING.finditer(question)), default=0)
  for marks in _MARKS:
    runs: list[list[re.Match]] = []
    for mark in marks.finditer(question):
      if mark[1] in "Aa":
        runs.append([mark])
      elif runs and ord(mark[1]) == ord(runs[-1][-1][1]) + 1:
        runs[-1].append(mark)
    runs = [run for run in runs if len(run) > 1]
    if runs:
      # Text before the heading may mention (A) and (B), too.
      below = (run for run in runs if heading and run[0].start() >= heading)
      return _texts(question, next(below, max(reversed(runs), key=len)))
  return {}


def _texts(question: str, run: list[re.Match]) -> dict[str, str]:
  ends = [*(mark.start() for mark in run[1:]), len(question)]
  texts = (question[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True))
  # After the last option the question may continue on the next line.
  return {
    mark[1].upper(): text.split("\n")[0].strip() for mark, text in zip(run, texts, strict=True)
  }


def choice(answer: str, listed: dict[str, str]) -> str | None:
  """Returns the letter that an answer chooses.

  Args:
    answer: the text.
    listed: letter -> text, from `options`.

  Returns:
    The letter that the answer names; or else the one whose text equals the answer; or else the only
    one whose text is in it (of texts that contain each other, the longest); or else the only letter
    in it; None if there is none.
  """
  answer = answer.replace("*", "").strip()
  for match in (_ALONE.match(answer), _FIRST.match(answer), _NAMED.search(answer)):
    if match and match[1].upper() in listed:
      return match[1].upper()
  plain = _plain(answer)
  texts = {letter: _plain(text) for letter, text in listed.items() if _plain(text)}
  for letter, text in texts.items():
    if text == plain:
      return letter
  first = _BEFORE_WORDS.match(answer)
  if first and first[1] in listed:
    return first[1]
  letters = {"".join(groups) for groups in _ANYWHERE.findall(answer)} & listed.keys()
  inside = {
    letter: text
    for letter, text in texts.items()
    if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)
  }
  longest = {
    letter
    for letter, text in inside.items()
    if not any(text != other and text in other for other in inside.values())
  }
  return next((min(group) for group in (longest, letters) if len(group) == 1), None)


def _plain(text: str) -> str:
  return " ".join(text.lower().split()).rstrip(".")
