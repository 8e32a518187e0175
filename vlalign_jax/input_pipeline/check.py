"""Checks data without a run: reads and tokenizes every record, and decodes every picture.

Training stops at the first bad record; this lists them all. It reads complete files, whatever
data.samples and data.repeats select.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from vlalign_jax.data import images, measure, mixture, plan
from vlalign_jax.data.entries import entries
from vlalign_jax.data.records import Record, scan_records
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class MeasuredRecord:
  """The number of a record's tokens (0: skipped) and of learned ones, or why it is bad."""

  tokens: int = 0
  learned: int = 0
  counts: tuple[int, ...] = ()  # of `Encoded`
  images: dict[str, int] = dataclasses.field(default_factory=dict)  # full path -> tiles
  problem: str | None = None


@dataclasses.dataclass(frozen=True)
class MeasureRecord:
  """Measures a record by its number; can be pickled."""

  load: prepare.LoadExample

  def __call__(self, number: int) -> MeasuredRecord:
    try:
      encoded = self.load.encoded(number)
    except InputError as error:
      return MeasuredRecord(problem=str(error))
    if encoded.example is None:
      return MeasuredRecord(counts=encoded.counts)
    tokens, learned = len(encoded.example.tokens), int(encoded.example.loss_mask.sum())
    return MeasuredRecord(tokens, learned, encoded.counts, encoded.example.tiles)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
  """The result of `check`.

  Attributes:
    name: the config key that names the files.
    files: file -> (number of records, number of bad ones).
    records: the good records; joined if the run joins them and none is bad.
    measured: one for each of `records`.
    load: makes the examples of `records`.
    sizes: path -> (width, height) of every picture in the examples that can be decoded.
    problems: one line for each thing that is bad.
    unread: how many records have each key that nothing reads.
    good: file -> the numbers of its records of which nothing is bad, see `entries.entries`.
  """

  name: str
  files: dict[str, tuple[int, int]]
  records: tuple[Record, ...]
  measured: tuple[MeasuredRecord, ...]
  load: prepare.LoadExample
  sizes: dict[str, tuple[int, int]]
  problems: tuple[str, ...]
  unread: collections.Counter[str]
  good: dict[str, set[int]]

  @property
  def images(self) -> int:
    """Returns the number of distinct pictures in all examples."""
    return len({path for record in self.measured for path in record.images})

  @property
  def lengths(self) -> np.ndarray:
    """Returns int32[N], tokens of each record."""
    return np.array([record.tokens for record in self.measured], np.int32)


def check(task: prepare.Task, config, source: ModelSource, name: str) -> Report:
  """Reads, tokenizes and decodes all data that a config key names; bad data raises no error.

  Args:
    task: of the stage.
    config: of the run.
    source: the model of the run.
    name: "data.train" or "data.eval".

  Raises:
    InputError: template and tokenizer do not go together.
  """
  paths = list(dict.fromkeys(p.strip() for p in config.data[name.removeprefix("data.")].split(",")))
  files, records, problems = {}, [], []
  unread: collections.Counter[str] = collections.Counter()
  options = prepare.record_options(config.data, task.answers)
  for path in paths:
    try:
      good, errors, keys = scan_records(path, options)
    except InputError as error:  # the file is unusable
      files[path] = 0, 0
      problems.append(str(error))
      continue
    files[path] = len(good) + len(errors), len(errors)
    records += good
    problems += map(str, errors)
    unread += keys
  good = {path: {record.index for record in records if record.file == path} for path in files}

  if config.data.concatenate > 1 and name == "data.train" and not problems:
    train = mixture.load_mixture(config.data.train, "", "", config.seed, options)
    records = mixture.concatenate(train, config.data.concatenate).records
  load = prepare.example_loader(task, config, source, records)
  measured = measure.map_records(MeasureRecord(load), len(records), os.cpu_count() or 1)
  sizes, broken = look_at({path for result in measured for path in result.images}, source)
  for record, result in zip(records, measured, strict=True):
    bad = [result.problem] if result.problem else []
    bad += [f"{record.where}: {broken[path]}" for path in result.images if path in broken][:1]
    if bad:
      good[record.file].discard(record.index)
    total, total_bad = files[record.file]
    files[record.file] = total, total_bad + len(bad)
    problems += bad
  if records and not any(result.tokens for result in measured):
    problems.append(f"{name}: nothing can be learned from any record")
  return Report(
    name=name,
    files=files,
    records=tuple(records),
    measured=tuple(measured),
    load=load,
    sizes=sizes,
    problems=tuple(problems),
    unread=unread,
    good=good,
  )


def good_entries(report: Report) -> Iterator[Any]:
  """Yields the entries of the files of which nothing is bad, as they are written there."""
  for path, numbers in report.good.items():
    if numbers:
      yield from (entry for number, _, entry in entries(path) if number in numbers)


def look_at(
  paths: set[str], source: ModelSource
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
  """Decodes pictures; returns (path -> width and height, path -> why it cannot be decoded)."""
  load = prepare.LoadImage(source.images, source.layout, blank=False)

  def look(path: str) -> tuple[int, int] | str:
    try:
      load(path)
      return images.size(path)
    except InputError as error:
      return str(error)

  ordered = sorted(paths)
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders release the GIL
    seen = list(tqdm(pool.map(look, ordered), "pictures", len(ordered), delay=2, leave=False))
  results = dict(zip(ordered, seen, strict=True))
  broken = {path: reason for path, reason in results.items() if isinstance(reason, str)}
  sizes = {path: size for path, size in results.items() if not isinstance(size, str)}
  return sizes, broken


def packing(config, report: Report) -> dict[str, float] | None:
  """Returns `plan.statistics` of one shuffled pass over the usable records; None without any."""
  usable = np.flatnonzero(report.lengths)
  if not len(usable):
    return None
  planned = plan.plan_batches(
    np.random.default_rng(config.seed).permutation(usable),
    report.lengths,
    plan.ImageSets.from_paths(record.images for record in report.measured),
    batch_size=config.batch_size,
    max_length=config.data.max_length,
    row_multiple=config.grad_accumulation,
    pack=config.data.pack,
    max_images_per_row=config.data.max_images,
  )
  return plan.statistics(planned) | {"row_length": int(planned.lengths.max())}
