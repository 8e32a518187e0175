"""Data checked as a run would read it, without a run: every record, every picture, what they make.

Where training stops at the first bad record, this lists them all. It reads whole files, whatever
data.samples and data.repeats take of them.
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
  """What a record comes to: its tokens (0: skipped) and the learnt ones, or why it is bad."""

  tokens: int = 0
  learnt: int = 0
  counts: tuple[int, ...] = ()  # as of `prepare.Task`
  images: tuple[str, ...] = ()  # full paths
  problem: str | None = None


@dataclasses.dataclass(frozen=True)
class MeasureRecord:
  """Record number -> MeasuredRecord; can be pickled."""

  load: prepare.LoadExample

  def __call__(self, number: int) -> MeasuredRecord:
    try:
      found = self.load.encoded(number)
    except InputError as error:
      return MeasuredRecord(problem=str(error))
    if found.example is None:
      return MeasuredRecord(counts=found.counts)
    tokens, learnt = len(found.example.tokens), int(found.example.loss_mask.sum())
    return MeasuredRecord(tokens, learnt, found.counts, found.example.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
  """What `check` found.

  Attributes:
    name: the config key that names the files.
    files: file -> (records, bad ones among them).
    records: those that can be read; joined if the run joins them and none is bad.
    measured: of each of `records`.
    load: makes the examples of `records`.
    images: number of distinct pictures of all records, turns too long to be learnt left out.
    problems: one line for everything that is bad.
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
    """int32[N], tokens of each record."""
    return np.array([one.tokens for one in self.measured], np.int32)


def check(task: prepare.Task, config, source: ModelSource, name: str) -> Report:
  """Reads, tokenises and decodes everything that a config's `name` (such as data.eval) names.

  Args:
    task: of the stage.
    config: of the run.
    source: the model of the run.
    name: "data.train" or "data.eval".

  Raises:
    InputError: template and tokenizer do not go together; bad data is no error here.
  """
  paths = list(dict.fromkeys(p.strip() for p in config.data[name.removeprefix("data.")].split(",")))
  files, records, problems = {}, [], []
  for path in paths:
    try:
      good, errors = scan_records(
        path, config.data.images, task.answers, config.data.max_candidates
      )
    except InputError as error:  # the file as a whole
      files[path] = 0, 0
      problems.append(str(error))
      continue
    files[path] = len(good) + len(errors), len(errors)
    records += good
    problems += map(str, errors)

  if config.data.concatenate > 1 and name == "data.train" and not problems:
    whole = mixture.load_mixture(config.data.train, config.data.images, "", "", config.seed)
    records = mixture.concatenate(whole, config.data.concatenate).records
  load = prepare.example_loader(task, config, source, records)
  measured = measure.map_records(MeasureRecord(load), len(records), os.cpu_count() or 1)
  broken = undecodable({path for one in measured for path in one.images}, source)
  for record, one in zip(records, measured, strict=True):
    found = [one.problem] if one.problem else []
    found += [f"{record.where}: {broken[path]}" for path in one.images if path in broken][:1]
    total, bad = files[record.file]
    files[record.file] = total, bad + len(found)
    problems += found
  if records and not any(one.tokens for one in measured):
    problems.append(f"{name}: nothing can be learnt from any record")
  return Report(
    name=name,
    files=files,
    records=tuple(records),
    measured=tuple(measured),
    load=load,
    images=len({path for one in measured for path in one.images}),
    problems=tuple(problems),
  )


def undecodable(paths: set[str], source: ModelSource) -> dict[str, str]:
  """Which pictures the run could not read: path -> reason."""
  load = prepare.LoadImage(source.images, blank=False)

  def reason(path: str) -> str | None:
    try:
      load(path)
    except InputError as error:
      return str(error)
    return None

  ordered = sorted(paths)
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders release the GIL
    found = pool.map(reason, ordered)
    reasons = list(tqdm(found, "pictures", len(ordered), delay=2, leave=False))
  return {path: why for path, why in zip(ordered, reasons, strict=True) if why}


def packing(config, report: Report) -> dict[str, float] | None:
  """`plan.statistics` of one shuffled pass over the usable records; None if there are none."""
  usable = np.flatnonzero(report.lengths)
  if not len(usable):
    return None
  planned = plan.plan_batches(
    np.random.default_rng(config.seed).permutation(usable),
    report.lengths,
    plan.ImageSets.from_paths(one.images for one in report.measured),
    batch_size=config.batch_size,
    max_length=config.data.max_length,
    row_multiple=config.grad_accumulation,
    pack=config.data.pack,
    max_images_per_row=config.data.max_images,
  )
  return plan.statistics(planned) | {"row_length": int(planned.lengths.max())}
