"""The metrics of metrics.json, computed from the lines of predictions."""

import itertools
from collections.abc import Sequence

import numpy as np

from vlalign_jax.prediction import choices


def normalize_spaces(text: str) -> str:
  """Returns the text with each run of whitespace as one space, and none at its ends."""
  return " ".join(text.split())


def exact_match(line: dict) -> bool:
  """Returns whether a line's answer equals the reference, except for whitespace."""
  return normalize_spaces(line["answer"]) == normalize_spaces(line["reference"])


def summarize_generated(lines: list[dict]) -> dict[str, float | int]:
  """Summarizes the lines of mode `generate`.

  Returns:
    records, answers, unanswered (records); mean_tokens of answers; ended, the share of answers that
    ended by themselves; with references, the metrics of `compare_with_references`; with a reward
    model, reward, the mean score; with several answers to a record, best/ metrics of the best ones
    by reward, and any_exact_match, the share of records with any answer equal to the reference.
  """
  answered = [line for line in lines if line["answer"] is not None]
  records = {line["record"] for line in lines}
  numbers: dict[str, float | int] = {
    "records": len(records),
    "answers": len(answered),
    "unanswered": len(records - {line["record"] for line in answered}),
  }
  if not answered:
    return numbers
  numbers["mean_tokens"] = _mean([line["num_tokens"] for line in answered])
  numbers["ended"] = _mean([line["ended"] for line in answered])
  numbers |= _quality(answered)
  best = [line for line in answered if line.get("best")]
  numbers |= {f"best/{name}": value for name, value in _quality(best).items()}
  matches: dict[int, bool] = {}
  for line in answered:
    if line["reference"] is not None:
      matches[line["record"]] = matches.get(line["record"], False) or exact_match(line)
  if matches and len(answered) > len({line["record"] for line in answered}):
    numbers["any_exact_match"] = _mean([*matches.values()])
  return numbers


def _quality(lines: list[dict]) -> dict[str, float | int]:
  numbers = compare_with_references([line for line in lines if line["reference"] is not None])
  rewards = [line["reward"] for line in lines if line.get("reward") is not None]
  return numbers | ({"reward": _mean(rewards)} if rewards else {})


def compare_with_references(lines: list[dict]) -> dict[str, float | int]:
  """Compares answers with their references; returns {} without lines.

  Returns:
    exact_match, the share of answers that equal the reference, except for whitespace; for questions
    of multiple choice accuracy, the share of answers that choose the reference's option, choices,
    the number of such answers, and no_choice, the share that chooses none; bleu of the corpus, from
    0 to 100 (sacrebleu's defaults); rouge_l, the mean F measure from 0 to 1 (rouge-score's tokens,
    stemmed: letters a to z and digits alone).
  """
  if not lines:
    return {}
  numbers: dict[str, float | int] = {"exact_match": _mean([exact_match(line) for line in lines])}
  chosen = [pair for line in lines if (pair := _choices(line))]
  if chosen:
    numbers["accuracy"] = _mean([answer == right for answer, right in chosen])
    numbers["choices"] = len(chosen)
    numbers["no_choice"] = _mean([answer is None for answer, _ in chosen])
  answers, references = zip(*((line["answer"], line["reference"]) for line in lines), strict=True)
  return numbers | {"bleu": _bleu(answers, references), "rouge_l": _rouge_l(answers, references)}


def _choices(line: dict) -> tuple[str | None, str] | None:
  """Returns (the answer's choice, the right one); None if it is not a multiple-choice question."""
  options = choices.options(line["prompt"])
  right = choices.choice(line["reference"], options)
  return (choices.choice(line["answer"], options), right) if right else None


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
  import sacrebleu  # imported here: it and rouge_score take a second to load

  return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)


def _rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
  pairs = zip(references, answers, strict=True)
  return _mean([scorer.score(right, answer)["rougeL"].fmeasure for right, answer in pairs])


def summarize_scored(lines: list[dict], key: str) -> dict[str, float | int]:
  """Summarizes the lines of the modes `logprobs` and `reward`.

  Args:
    lines: of all answers.
    key: `logprob` or `reward`.

  Returns:
    records, answers, left_out (answers); the key's mean; with ranked answers pair_accuracy, the
    share of a record's pairs whose better answer has the higher value, and pairs, their number.
  """
  numbers: dict[str, float | int] = {
    "records": len({line["record"] for line in lines}),
    "answers": len(lines),
    "left_out": sum("reason" in line for line in lines),
  }
  scored = [line for line in lines if line[key] is not None]
  if not scored:
    return numbers
  numbers[key] = _mean([line[key] for line in scored])
  if key == "logprob":
    tokens = sum(line["num_tokens"] for line in scored)
    numbers["logprob_per_token"] = sum(line[key] for line in scored) / tokens
  pairs = [better[key] > worse[key] for better, worse in ranked_pairs(scored)]
  if pairs:
    numbers |= {"pair_accuracy": _mean(pairs), "pairs": len(pairs)}
  return numbers


def ranked_pairs(lines: list[dict]) -> list[tuple[dict, dict]]:
  """Returns (better, worse) lines of every two different answers to a record, by rank."""
  records: dict[int, list[dict]] = {}
  for line in lines:
    if "rank" in line:
      records.setdefault(line["record"], []).append(line)
  pairs = []
  for answers in records.values():
    distinct: dict[str, dict] = {}  # an answer that equals a better one does not count
    for line in sorted(answers, key=lambda line: line["rank"]):
      distinct.setdefault(line["answer"].strip(), line)
    pairs += itertools.combinations(distinct.values(), 2)
  return pairs


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values))
