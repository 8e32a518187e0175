"""Selects the records of a run: files, samples of each, and how often an epoch shows them."""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vlalign_jax.data.records import DEFAULT, Options, Record, load_records
from vlalign_jax.errors import InputError

# The use of a random generator, part of its seed so that no two uses share a stream.
_SAMPLE, _EXTRA, _SHUFFLE, _SPLIT, _JOIN = range(1, 6)


@dataclass(frozen=True, eq=False)
class Mixture:
  """Records and how often an epoch shows them.

  Attributes:
    records: N records, file by file.
    file_of: int32[N] the position of each record's file in `repeats`.
    repeats: how many times an epoch shows each file.
    seed: for every random choice from this mixture.
  """

  records: tuple[Record, ...]
  file_of: np.ndarray
  repeats: tuple[float, ...]
  seed: int


def load_mixture(
  files: str, samples: str, repeats: str, seed: int, options: Options = DEFAULT
) -> Mixture:
  """Reads the files of data.train.

  Args:
    files: comma-separated paths.
    samples: number of records to draw from each file, without replacement; empty or 0: all. One
      number for each file, comma-separated, or one for all.
    repeats: how many times an epoch shows each file; empty: once. 2.5 shows it twice and then half
      of it, another half in each epoch. One number for each file or one for all.
    seed: for the samples and the epochs.
    options: how records are read.

  Raises:
    InputError: a file, a record or one of these arguments is bad.
  """
  shares = _numbers(repeats, len(files.split(",")), 1.0, float, "data.repeats")
  if not any(shares):
    raise InputError("data.repeats is 0 for every file; give at least one a positive weight")
  by_file = load_samples(files, samples, seed, "train", options)
  file_of = np.repeat(np.arange(len(by_file), dtype=np.int32), [len(part) for part in by_file])
  return Mixture(tuple(itertools.chain(*by_file)), file_of, tuple(shares), seed)


def load_samples(
  files: str, samples: str, seed: int, split: str, options: Options = DEFAULT
) -> list[list[Record]]:
  """Returns the records drawn from each file of data.train or data.eval, in file order.

  Args:
    files, samples, seed, options: as for `load_mixture`.
    split: "train" or "eval"; errors name its keys.

  Raises:
    InputError: a file, a record, `samples` or `seed` is bad.
  """
  key = "data.samples" if split == "train" else f"data.{split}_samples"
  if seed < 0:
    raise InputError(f"seed is {seed}; give 0 or more")
  paths = [path.strip() for path in files.split(",")]
  if not all(paths):
    raise InputError(f'data.{split} "{files}" has an empty path; give comma-separated files')
  counts = _numbers(samples, len(paths), 0, int, key)
  by_file = []
  for position, (path, count) in enumerate(zip(paths, counts, strict=True)):
    records = load_records(path, options)
    if count > len(records):
      raise InputError(
        f"{path} has {len(records)} records, fewer than the {count} of {key}; lower it"
      )
    if count:
      chosen = _generator(seed, _SAMPLE, position).choice(len(records), count, replace=False)
      records = [records[index] for index in np.sort(chosen)]
    by_file.append(records)
  return by_file


def epoch_order(mixture: Mixture, epoch: int, shuffle: bool) -> np.ndarray:
  """Returns int64[M] indices into `mixture.records`, in the order in which an epoch shows them.

  They depend on (mixture, epoch) alone; M is the same for every epoch. Unshuffled, the complete
  passes over a file come first, then its partial pass, then the next file.
  """
  order = [np.zeros(0, np.int64)]
  for position, weight in enumerate(mixture.repeats):
    indices = np.flatnonzero(mixture.file_of == position)
    passes = int(weight)
    # Rounded up, so that an epoch shows some of every such file; 1e-9 allows for 2.1 - 2 > 0.1.
    part = math.ceil(len(indices) * (weight - passes) - 1e-9)
    extra = _generator(mixture.seed, _EXTRA, position, epoch).permutation(indices)[:part]
    order += [np.tile(indices, passes), np.sort(extra)]
  order = np.concatenate(order)
  return _generator(mixture.seed, _SHUFFLE, epoch).permutation(order) if shuffle else order


def split_eval(mixture: Mixture, fraction: float) -> tuple[Mixture, tuple[Record, ...]]:
  """Holds out a random share of the records that an epoch shows, at least one on each side.

  A record of a file that data.train names twice is on one side only.

  Returns:
    (the mixture without the held-out records, these in file order, each once).

  Raises:
    InputError: the fraction is not between 0 and 1, or there are fewer than two distinct records.
  """
  if not 0 < fraction < 1:
    raise InputError(f"the evaluation fraction is {fraction}; give one between 0 and 1")
  real = {file: os.path.realpath(file) for file in {record.file for record in mixture.records}}
  keys = [(real[record.file], record.index) for record in mixture.records]
  shown = np.asarray(mixture.repeats)[mixture.file_of] > 0
  distinct = list(dict.fromkeys(key for key, seen in zip(keys, shown, strict=True) if seen))
  if len(distinct) < 2:
    raise InputError(
      f"cannot hold out {fraction} of {len(distinct)} record; give more records or data.eval"
    )
  count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1)
  chosen = _generator(mixture.seed, _SPLIT).choice(len(distinct), count, replace=False)
  held_out = {distinct[index] for index in chosen}
  stays = np.array([key not in held_out for key in keys])
  train = replace(
    mixture,
    records=tuple(mixture.records[index] for index in np.flatnonzero(stays)),
    file_of=mixture.file_of[stays],
  )
  by_key = dict(zip(keys, mixture.records, strict=True))
  return train, tuple(by_key[key] for key in distinct if key in held_out)


def concatenate(mixture: Mixture, count: int) -> Mixture:
  """Joins records of a file, `count` each, into conversations with the images of all.

  The mixture's seed chooses which ones, once; a file's last conversation may have fewer.

  Args:
    mixture: its records must have answers to all turns.
    count: records of each conversation, at least 1.

  Raises:
    InputError: records with different system texts would be joined.
  """
  joined, file_of = [], []
  for position in range(len(mixture.repeats)):
    indices = np.flatnonzero(mixture.file_of == position)
    order = _generator(mixture.seed, _JOIN, position).permutation(indices)
    groups = [np.sort(order[start : start + count]) for start in range(0, len(order), count)]
    joined += [_joined([mixture.records[index] for index in group]) for group in groups]
    file_of += [position] * len(groups)
  return replace(mixture, records=tuple(joined), file_of=np.array(file_of, np.int32))


def _joined(records: list[Record]) -> Record:
  if other := [record for record in records if record.system != records[0].system]:
    raise InputError(
      f"{other[0].where}: its system text differs from that of {records[0].where}; records that"
      " data.concatenate joins must have the same, or set it to 1"
    )
  return replace(
    records[0],
    id=" + ".join(record.id for record in records),
    images=tuple(image for record in records for image in record.images),
    turns=tuple(turn for record in records for turn in record.turns),
  )


def _numbers(text: str, files: int, default: float, read: Callable, name: str) -> list:
  """Parses "", "5" or "5,0,3" as one non-negative number per file; an empty one is `default`."""
  entries = [entry.strip() for entry in text.split(",")]
  if len(entries) not in (1, files):
    raise InputError(f"{name} has {len(entries)} numbers for {files} files; give one for each")
  try:
    numbers = [read(entry) if entry else default for entry in entries]
  except ValueError as error:
    kind = "whole numbers" if read is int else "numbers"
    raise InputError(f'{name} "{text}" is not made of {kind}') from error
  if not all(0 <= number < math.inf for number in numbers):  # false for nan as well
    raise InputError(f'{name} "{text}": every number must be 0 or more, and finite')
  return numbers * files if len(numbers) < files else numbers


def _generator(seed: int, *key: int) -> np.random.Generator:
  return np.random.Generator(np.random.PCG64([seed, *key]))
