"""What `check` found, as lines of text; and examples as the model reads them."""

from collections.abc import Sequence

import numpy as np

from vlalign_jax.data import check
from vlalign_jax.data.sft import LoadExample


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
  skipped = [one for one in measured if not one.tokens and not one.problem]
  shortened = [one for one in measured if one.tokens and one.dropped_turns]
  dropped = sum(one.dropped_turns for one in shortened)
  lines.append(
    f"  too long for data.max_length={config.data.max_length}: {len(skipped):,} records skipped,"
    f" {dropped:,} turns dropped from the ends of {len(shortened):,} others"
  )
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
  """An example as the model reads it: learnt parts as «...», an image as <image x N>."""
  example = load(number)
  if example is None:
    return "(skipped: its first answer does not fit)"
  learnt = np.concatenate([[False], example.weights[:-1] > 0])
  is_image = example.tokens == load.image_token_id
  kinds = np.where(is_image, 2, learnt)
  starts = np.flatnonzero(np.diff(kinds, prepend=-1))
  parts = []
  for start, part in zip(starts, np.split(example.tokens, starts[1:]), strict=True):
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
