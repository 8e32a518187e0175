"""Options of questions and choices of answers, as ScienceQA and similar data sets write them."""

import pytest

from vlalign_jax.prediction.choices import choice, options

SCIENCE_QA = "<image>\nIs it one?\nOptions: \n(A) yes \n(B) no \nHint: It is\nmade\n\nOption:"
OPTIONS = {"A": "an apple", "B": "a pear", "C": "a green pear"}


@pytest.mark.parametrize(
  ("question", "expected"),
  [
    (SCIENCE_QA, {"A": "yes", "B": "no"}),
    ("Which?\nOptions: (A) one (2) (B) two\n", {"A": "one (2)", "B": "two"}),
    (
      "Which?\nA. one\nB. two\nC. three\nAnswer with a letter.",
      {"A": "one", "B": "two", "C": "three"},
    ),
    ("Which?\nA) one\nB) two", {"A": "one", "B": "two"}),
    ("Figure (A) shows it. Options: (A) x (B) y (C) z", {"A": "x", "B": "y", "C": "z"}),
    ("(A) or (B)?\nOptions: (A) x (B) y", {"A": "x", "B": "y"}),
    (
      "Context: (A) is red, (B) blue, (C) gray.\nOptions: (A) one (B) two",
      {"A": "one", "B": "two"},
    ),
    ("Options: (A) x (B) y (C) z\nSay (A) or (B).", {"A": "x", "B": "y", "C": "z"}),
    ("Which? (a) one (b) two", {"A": "one", "B": "two"}),
    ("Which?\nA.one\nB.two", {"A": "one", "B": "two"}),
    ("What is in the picture (A)?", {}),
    ("A. Lincoln was president?", {}),
    ("What?", {}),
  ],
)
def test_options(question, expected):
  assert options(question) == expected


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("B", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B. a pear", "B"),
    ("B: whatever", "B"),
    ("(C) a pear", "C"),
    ("The answer is B: no", "B"),
    ("The answer is (C).", "C"),
    ("the correct option: a", "A"),
    ("Answer: C", "C"),
    ("The answer is B because an apple is red.", "B"),
    ("B\nBecause it is so.", "B"),
    ("B because an apple is red", "B"),
    ("Option B is correct", "B"),
    ("**B**", "B"),
    ("The answer is **C**.", "C"),
    ("I think it's (B)", "B"),
    ("It is B.", "B"),
    ("It must be A", "A"),
    ("b", "B"),
    ("(c)", "C"),
    ("Neither B nor C", None),
    ("There is vitamin C in an apple", "A"),
    ("The answer is a dog", None),
    ("a pear", "B"),
    ("A Pear.", "B"),
    ("It is a green pear, I think", "C"),
    ("I see an apple here", "A"),
    ("I see an apple or a pear", None),
    ("D", None),
    ("A dog", None),
    ("pears", None),
    ("", None),
  ],
)
def test_choice(answer, expected):
  assert choice(answer, OPTIONS) == expected
