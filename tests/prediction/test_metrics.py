"""The metrics of generated answers equal numbers worked out by hand."""

import pytest

from vlalign_jax.prediction import metrics


def line(record: int, answer: str | None, reference: str | None, **more) -> dict:
  fields = {"record": record, "prompt": "What?", "answer": answer, "reference": reference}
  return fields | {"num_tokens": 2, "ended": True} | more


def test_answers_and_references():
  question = "Which?\n(A) the cat\n(B) the dog"
  lines = [
    line(0, " the  cat\nsat ", "the cat sat"),
    line(1, "the cat", "the cat sat", ended=False, num_tokens=4),
    line(2, "The answer is A: the cat", "A", prompt=question),
    line(3, "the dog", "A", prompt=question),
    line(4, "both", "(B)", prompt=question),
    line(5, "free", None),
    line(6, None, "nothing"),
  ]
  numbers = metrics.summarize_generated(lines)
  assert (numbers["records"], numbers["answers"], numbers["unanswered"]) == (7, 6, 1)
  assert numbers["exact_match"] == pytest.approx(1 / 5)
  assert (numbers["accuracy"], numbers["choices"]) == (pytest.approx(1 / 3), 3)
  assert numbers["no_choice"] == pytest.approx(1 / 3)
  assert numbers["ended"] == pytest.approx(5 / 6)
  assert numbers["mean_tokens"] == pytest.approx(14 / 6)
  assert "reward" not in numbers
  assert "any_exact_match" not in numbers
  # F is 0.8 with recall 2/3 and precision 1, and 2/7 with recall 1 and precision 1/6.
  assert numbers["rouge_l"] == pytest.approx((1 + 0.8 + 2 / 7 + 0 + 0) / 5)


def test_bleu():
  same = [line(n, "the cat sat on the mat", "the cat sat on the mat") for n in range(2)]
  assert metrics.summarize_generated(same)["bleu"] == pytest.approx(100)
  # Precisions 5/6, 4/5, 3/4, 2/3 and no brevity penalty (Papineni et al. 2002): their product 1/3.
  other = [line(0, "the cat sat on the rug", "the cat sat on the mat")]
  assert metrics.summarize_generated(other)["bleu"] == pytest.approx(100 * (1 / 3) ** 0.25)


def test_best_of_several():
  lines = [
    line(0, "a", "b", sample=0, reward=1.0, best=False),
    line(0, "b", "b", sample=1, reward=2.0, best=True),
    line(1, "b", "b", sample=0, reward=None, best=False),
    line(1, "a", "b", sample=1, reward=3.0, best=True),
  ]
  numbers = metrics.summarize_generated(lines)
  assert numbers["exact_match"] == 0.5
  assert numbers["reward"] == 2
  assert numbers["best/exact_match"] == 0.5
  assert numbers["best/reward"] == 2.5
  assert numbers["any_exact_match"] == 1


def test_an_answer_that_equals_a_better_one_is_in_no_pair():
  lines = [{"record": 0, "rank": rank, "answer": text} for rank, text in enumerate("abac")]
  pairs = [(better["rank"], worse["rank"]) for better, worse in metrics.ranked_pairs(lines)]
  assert pairs == [(0, 1), (0, 3), (1, 3)]
