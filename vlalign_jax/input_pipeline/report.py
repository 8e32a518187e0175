"""What `check` found, as lines of text; and examples as the model reads them."""

from collections.abc import Sequence

import numpy as np

from vlalign_jax.data import plan
from vlalign_jax.data.measure import Measured
from vlalign_jax.input_pipeline import check
from vlalign_jax.input_pipeline.prepare import LoadExample


def describe(config, report: check.Report) -> list[str]:
  """The report as lines of text."""
  lines = [report.name]
  width = max(map(len, report.files))
  for path, (total, bad) in report.files.items():
    lines.append(f"  {path:{width}}  {total:,} records, {bad:,} bad")
  measured, lengths = report.measured, report.lengths
  turns = sum(len(record.turns) for record in report.records)
  text_only = sum(not record.images for record in report.records)
  lines.append(f"  {turns:,} turns, {report.images:,} pictures, {text_only:,} records without one")
  sound = [one for one in measured if not one.problem]
  if sound:
    found = Measured(
      np.array([one.tokens for one in sound]),
      np.array([one.counts for one in sound]),
      plan.ImageSets.from_paths(one.images for one in sound),
    )
    lines.append(f"  {report.load.task.describe(found, config.data.max_length)}")
  if not lengths.any():
    return lines
  total, learnt = int(lengths.sum()), sum(one.learnt for one in measured)
  lines.append(f"  {total:,} tokens, {learnt:,} of them learnt ({learnt / total:.1%})")
  lines += ["  tokens of a record", *(f"    {line}" for line in histogram(lengths[lengths > 0]))]
  how = check.packing(config, report)
  lines.append(
    f"  packed: {how['steps']:,} steps of {how['rows']:,} rows x {how['row_length']:,} tokens,"
    f" {how['images_per_row']} pictures a row; {how['packing_efficiency']:.1%} of the tokens and"
    f" {how['image_efficiency']:.1%} of the picture places are used"
  )
  return lines


def histogram(lengths: np.ndarray, bins: int = 12, width: int = 40) -> list[str]:
  """Percentiles and bars of positive numbers, as lines of text.

  Args:
    lengths: int[N], N at least 1.
    bins: at most so many bars.
    width: characters of the longest bar.
  """
  shares = (0, 10, 50, 90, 99, 100)
  values = np.percentile(lengths, shares, method="inverted_cdf")
  names = ["min", *(f"{share} %" for share in shares[1:-1]), "max"]
  lines = [",  ".join(f"{name}: {value:,}" for name, value in zip(names, values, strict=True))]
  low, high = int(lengths.min()), int(lengths.max())
  step = -(-(high - low + 1) // bins)
  counts = np.bincount((lengths - low) // step)
  digits = len(f"{high:,}")
  for place, count in enumerate(counts):
    start = low + place * step
    end = min(start + step - 1, high)
    bar = "#" * -(-width * int(count) // int(counts.max()))
    lines.append(f"{start:{digits},} - {end:{digits},}  {bar:{width}}  {count:,}")
  return lines


def render(load: LoadExample, number: int) -> str:
  """An example as the model reads it: learnt parts as «...», an image as <image x N>.

  Ranked answers follow their prompt, a line each.
  """
  example = load(number)
  if example is None:
    return f"(skipped: it lacks {load.task.needs})"
  learnt = np.concatenate([[False], example.loss_mask[:-1] > 0])
  if not len(example.answers):
    return _text(load, example.tokens, learnt)
  shared = example.tokens[: np.argmax(example.branches == 1) + 1]  # with the copy of its last
  lines = [_text(load, shared, np.zeros(len(shared), bool))]
  for rank in range(1, len(example.answers) + 1):
    answer = example.tokens[(example.branches == rank) & learnt]
    lines.append(f"{rank}: {_text(load, answer, np.ones(len(answer), bool))}")
  return "\n".join(lines)


def _text(load: LoadExample, tokens: np.ndarray, learnt: np.ndarray) -> str:
  kinds = np.where(tokens == load.image_token_id, 2, learnt)
  starts = np.flatnonzero(np.diff(kinds, prepend=-1))
  parts = []
  for start, part in zip(starts, np.split(tokens, starts[1:]), strict=True):
    if kinds[start] == 2:
      parts.append(f"<image x {len(part)}>")
    else:
      text = load.tokenizer.decode(part, skip_special_tokens=False)
      parts.append(f"«{text}»" if kinds[start] else text)
  return "".join(parts)


def summary(reports: Sequence[check.Report]) -> list[str]:
  """Every problem of all reports, or that there is none."""
  problems = [problem for report in reports for problem in report.problems]
  if not problems:
    return ["no bad record"]
  return [f"{len(problems):,} bad", *(f"  {problem}" for problem in problems)]
