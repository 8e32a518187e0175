"""Writes the results of `check` as lines of text, and examples as the model reads them."""

from collections.abc import Sequence

import numpy as np

from vlalign_jax.data import plan
from vlalign_jax.data.measure import Measured
from vlalign_jax.data.records import count_keys
from vlalign_jax.input_pipeline import check
from vlalign_jax.input_pipeline.prepare import LoadExample


def describe(config, report: check.Report) -> list[str]:
  """Returns the report as lines of text."""
  lines = [report.name]
  width = max(map(len, report.files))
  for path, (total, bad) in report.files.items():
    lines.append(f"  {path:{width}}  {total:,} records, {bad:,} bad")
  if report.unread:
    lines.append(f"  keys that nothing reads: {count_keys(report.unread)}")
  measured, lengths = report.measured, report.lengths
  turns = sum(len(record.turns) for record in report.records)
  text_only = sum(not record.images for record in report.records)
  lines.append(f"  {turns:,} turns, {report.images:,} pictures, {text_only:,} records without one")
  good = [record for record in measured if not record.problem]
  if good:
    usable = Measured(
      np.array([record.tokens for record in good]),
      np.array([record.counts for record in good]),
      plan.ImageSets.from_paths(record.images for record in good),
    )
    lines.append(f"  {report.load.task.describe(usable, config.data.max_length)}")
  if not lengths.any():
    return lines
  total, learned = int(lengths.sum()), sum(record.learned for record in measured)
  lines.append(f"  {total:,} tokens, {learned:,} of them learned ({learned / total:.1%})")
  lines += ["  tokens of a record", *(f"    {line}" for line in histogram(lengths[lengths > 0]))]
  packing = check.packing(config, report)
  places = "tiles of pictures" if report.load.layout.most_tiles > 1 else "pictures"
  lines.append(
    f"  packed: {packing['steps']:,} steps of {packing['rows']:,} rows x"
    f" {packing['row_length']:,} tokens, {packing['images_per_row']} {places} a row;"
    f" {packing['packing_efficiency']:.1%} of the tokens and"
    f" {packing['image_efficiency']:.1%} of the picture places are used"
  )
  return lines


def histogram(lengths: np.ndarray, bins: int = 12, width: int = 40) -> list[str]:
  """Draws percentiles and bars of positive numbers as lines of text.

  Args:
    lengths: int[N], N at least 1.
    bins: the most bars.
    width: characters of the longest bar.
  """
  shares = (0, 10, 50, 90, 99, 100)
  values = np.percentile(lengths, shares, method="inverted_cdf")
  names = ["min", *(f"{share} %" for share in shares[1:-1]), "max"]
  lines = [",  ".join(f"{name}: {value:,}" for name, value in zip(names, values, strict=True))]
  counted = count_bins(lengths, bins)
  digits, most = len(f"{int(lengths.max()):,}"), max(count for *_, count in counted)
  for start, end, count in counted:
    bar = "#" * -(-width * count // most)
    lines.append(f"{start:{digits},} - {end:{digits},}  {bar:{width}}  {count:,}")
  return lines


def count_bins(values: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
  """Returns (smallest, greatest, how many) of at most `bins` equal ranges that hold all values.

  Args:
    values: int[N], N at least 1.
    bins: the most ranges.
  """
  low, high = int(values.min()), int(values.max())
  step = -(-(high - low + 1) // bins)
  counts = np.bincount((values - low) // step)
  starts = [low + place * step for place in range(len(counts))]
  return [
    (start, min(start + step - 1, high), int(count))
    for start, count in zip(starts, counts, strict=True)
  ]


def render(load: LoadExample, number: int) -> str:
  """Returns an example as the model reads it: learned parts as «...», an image as <image x N>.

  Ranked answers follow their prompt, one line each.
  """
  example = load(number)
  if example is None:
    return f"(skipped: it lacks {load.task.needs})"
  learned = np.concatenate([[False], example.loss_mask[:-1] > 0])
  if not len(example.answers):
    return _text(load, example.tokens, learned)
  prompt = example.tokens[: np.argmax(example.branches == 1) + 1]  # with its last token's copy
  lines = [_text(load, prompt, np.zeros(len(prompt), bool))]
  for rank in range(1, len(example.answers) + 1):
    answer = example.tokens[(example.branches == rank) & learned]
    lines.append(f"{rank}: {_text(load, answer, np.ones(len(answer), bool))}")
  return "\n".join(lines)


def _text(load: LoadExample, tokens: np.ndarray, learned: np.ndarray) -> str:
  kinds = np.where(tokens == load.layout.image_token_id, 2, learned)
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
  """Returns lines with every problem of all reports, or one that says that there is none."""
  problems = [problem for report in reports for problem in report.problems]
  if not problems:
    return ["no bad record"]
  return [f"{len(problems):,} bad", *(f"  {problem}" for problem in problems)]
