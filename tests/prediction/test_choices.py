"""Options of questions and the choices of answers, as ScienceQA and its imitators write them."""

import pytest

from vlalign_jax.prediction.choices import choice, options

SCIENCE_QA = "<image>\nIs it one?\nOptions: \n(A) yes \n(B) no \nHint: It is\nmade\n\nOption:"
GIVEN = {"A": "an apple", "B": "a pear", "C": "a green pear"}


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
  assert choice(answer, GIVEN) == expected
