"""Checks data without a run: reads and tokenizes every record, and decodes every picture.

Training stops at the first bad record; this lists them all. It reads complete files, whatever
data.samples and data.repeats select.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from vlalign_jax.data import measure, mixture, plan
from vlalign_jax.data.records import Record, scan_records
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import prepare
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class MeasuredRecord:
  """The number of a record's tokens (0: skipped) and of learned ones, or why it is bad."""

  tokens: int = 0
  learned: int = 0
  counts: tuple[int, ...] = ()  # as of `Encoded`
  images: tuple[str, ...] = ()  # full paths
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
    return MeasuredRecord(tokens, learned, encoded.counts, encoded.example.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
  """The result of `check`.

  Attributes:
    name: the config key that names the files.
    files: file -> (number of records, number of bad ones).
    records: the good records; joined if the run joins them and none is bad.
    measured: one for each of `records`.
    load: makes the examples of `records`.
    images: the number of distinct pictures in all examples.
    problems: one line for each thing that is bad.
  """

  name: str
  files: dict[str, tuple[int, int]]
  records: tuple[Record, ...]
  measured: tuple[MeasuredRecord, ...]
  load: prepare.LoadExample
  images: int
  problems: tuple[str, ...]

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
  for path in paths:
    try:
      good, errors = scan_records(
        path, config.data.images, task.answers, config.data.max_candidates
      )
    except InputError as error:  # the file is unusable
      files[path] = 0, 0
      problems.append(str(error))
      continue
    files[path] = len(good) + len(errors), len(errors)
    records += good
    problems += map(str, errors)

  if config.data.concatenate > 1 and name == "data.train" and not problems:
    train = mixture.load_mixture(config.data.train, config.data.images, "", "", config.seed)
    records = mixture.concatenate(train, config.data.concatenate).records
  load = prepare.example_loader(task, config, source, records)
  measured = measure.map_records(MeasureRecord(load), len(records), os.cpu_count() or 1)
  images = {path for result in measured for path in result.images}
  broken = undecodable(images, source)
  for record, result in zip(records, measured, strict=True):
    bad = [result.problem] if result.problem else []
    bad += [f"{record.where}: {broken[path]}" for path in result.images if path in broken][:1]
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
    images=len(images),
    problems=tuple(problems),
  )


def undecodable(paths: set[str], source: ModelSource) -> dict[str, str]:
  """Returns the pictures that cannot be decoded: path -> reason."""
  load = prepare.LoadImage(source.images, blank=False)

  def reason(path: str) -> str | None:
    try:
      load(path)
    except InputError as error:
      return str(error)
    return None

  ordered = sorted(paths)
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders release the GIL
    reasons = pool.map(reason, ordered)
    reasons = list(tqdm(reasons, "pictures", len(ordered), delay=2, leave=False))
  return {path: reason for path, reason in zip(ordered, reasons, strict=True) if reason}


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
