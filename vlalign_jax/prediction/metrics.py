"""How good predictions are: what metrics.json says of their lines."""

import itertools
from collections.abc import Sequence

import numpy as np

from vlalign_jax.prediction import choices


def normalised(text: str) -> str:
  """The text with every run of whitespace as one space, none at its ends."""
  return " ".join(text.split())


def exact_match(line: dict) -> bool:
  """Whether a line's answer is the reference but for whitespace."""
  return normalised(line["answer"]) == normalised(line["reference"])


def of_generated(lines: list[dict]) -> dict[str, float | int]:
  """Of the lines of mode `generate`.

  Returns:
    records, answers, unanswered (records); mean_tokens of answers; ended, the share of answers that
    ended by themselves; where there are references those of `of_references`; with a reward model
    reward, the mean, and with several answers to a record best/ of the best ones by reward, and
    any_exact_match, the share of records of which any answer is the reference.
  """
  answered = [line for line in lines if line["answer"] is not None]
  records = {line["record"] for line in lines}
  found: dict[str, float | int] = {
    "records": len(records),
    "answers": len(answered),
    "unanswered": len(records - {line["record"] for line in answered}),
  }
  if not answered:
    return found
  found["mean_tokens"] = _mean([line["num_tokens"] for line in answered])
  found["ended"] = _mean([line["ended"] for line in answered])
  found |= _quality(answered)
  best = [line for line in answered if line.get("best")]
  found |= {f"best/{name}": value for name, value in _quality(best).items()}
  matches: dict[int, bool] = {}
  for line in answered:
    if line["reference"] is not None:
      matches[line["record"]] = matches.get(line["record"], False) or exact_match(line)
  if matches and len(answered) > len({line["record"] for line in answered}):
    found["any_exact_match"] = _mean([*matches.values()])
  return found


def _quality(lines: list[dict]) -> dict[str, float | int]:
  found = of_references([line for line in lines if line["reference"] is not None])
  rewards = [line["reward"] for line in lines if line.get("reward") is not None]
  return found | ({"reward": _mean(rewards)} if rewards else {})


def of_references(lines: list[dict]) -> dict[str, float | int]:
  """Of answers that have a reference answer.

  Returns:
    exact_match, the share of answers that are the reference but for whitespace; accuracy, of the
    answers to questions of multiple choice the share that chooses the reference's option, with
    choices, how many these are, and no_choice, the share of these that chooses none; bleu, of the
    corpus, from 0 to 100 (sacrebleu's defaults); rouge_l, the mean F measure from 0 to 1
    (rouge-score's own tokens, stemmed: it sees the letters a to z and digits alone). Empty without
    answers.
  """
  if not lines:
    return {}
  found: dict[str, float | int] = {"exact_match": _mean([exact_match(line) for line in lines])}
  chosen = [pair for line in lines if (pair := _choices(line))]
  if chosen:
    found["accuracy"] = _mean([answer == right for answer, right in chosen])
    found["choices"] = len(chosen)
    found["no_choice"] = _mean([answer is None for answer, _ in chosen])
  answers, references = zip(*((line["answer"], line["reference"]) for line in lines), strict=True)
  return found | {"bleu": _bleu(answers, references), "rouge_l": _rouge_l(answers, references)}


def _choices(line: dict) -> tuple[str | None, str] | None:
  """(the answer's choice, the right one) of a question of multiple choice."""
  given = choices.options(line["prompt"])
  right = choices.choice(line["reference"], given)
  return (choices.choice(line["answer"], given), right) if right else None


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
  import sacrebleu  # with the other one a second of start that only this takes

  return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)


def _rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
  pairs = zip(references, answers, strict=True)
  return _mean([scorer.score(right, answer)["rougeL"].fmeasure for right, answer in pairs])


def of_given(lines: list[dict], key: str) -> dict[str, float | int]:
  """Of the lines of the modes `logprobs` and `reward`.

  Args:
    lines: of all answers.
    key: what was computed, `logprob` or `reward`.

  Returns:
    records, answers, left_out (answers); the key's mean, and where answers are ranked the share of
    pairs of a record whose better answer has more of it, as `pair_accuracy`, with their number.
  """
  found: dict[str, float | int] = {
    "records": len({line["record"] for line in lines}),
    "answers": len(lines),
    "left_out": sum("reason" in line for line in lines),
  }
  known = [line for line in lines if line[key] is not None]
  if not known:
    return found
  found[key] = _mean([line[key] for line in known])
  if key == "logprob":
    tokens = sum(line["num_tokens"] for line in known)
    found["logprob_per_token"] = sum(line[key] for line in known) / tokens
  pairs = [better[key] > worse[key] for better, worse in ranked_pairs(known)]
  if pairs:
    found |= {"pair_accuracy": _mean(pairs), "pairs": len(pairs)}
  return found


def ranked_pairs(lines: list[dict]) -> list[tuple[dict, dict]]:
  """(better, worse) lines of every two differing answers to a record, by rank."""
  records: dict[int, list[dict]] = {}
  for line in lines:
    if "rank" in line:
      records.setdefault(line["record"], []).append(line)
  pairs = []
  for answers in records.values():
    distinct: dict[str, dict] = {}  # an answer that equals a better one is none of its own
    for line in sorted(answers, key=lambda line: line["rank"]):
      distinct.setdefault(line["answer"].strip(), line)
    pairs += itertools.combinations(distinct.values(), 2)
  return pairs


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values))
