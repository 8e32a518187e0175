"""From a config's `data` group to planned batches; a stage says what its examples are made of."""

import dataclasses
import itertools
import os
from collections.abc import Callable

import numpy as np
from absl import logging

from vlalign_jax.data import blank, images, measure, mixture, pipeline, plan, templates
from vlalign_jax.data.conversations import Answers
from vlalign_jax.data.encode import Example
from vlalign_jax.data.records import Record
from vlalign_jax.data.workers import SharedList
from vlalign_jax.errors import InputError
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Task:
  """What the data of one task of learning has for its own.

  Attributes:
    answers: what a record's last question must have, see `records.load_records`.
    encode: makes an example of a record; arguments as of `encode.encode`. The result has `example`
      (None where nothing is left to learn) and `counts`, a tuple of as many numbers each time.
    describe: (Measured, max_length) -> what became of the records, for the log.
    needs: what a record needs to be learnt from, for errors.
  """

  answers: Answers
  encode: Callable
  describe: Callable[[measure.Measured, int], str]
  needs: str


@dataclasses.dataclass(frozen=True)
class LoadExample:
  """Example number -> Example, tokenised when it is asked for; its image paths become full ones."""

  task: Task
  records: SharedList
  data: dict  # template, max_length, max_images, images
  tokenizer: object
  image_token_id: int
  tokens_per_image: int

  def encoded(self, number: int):
    """What `task.encode` makes of a record.

    Raises:
      InputError: the record does not go with the template, or has too many images.
    """
    record, data = self.records[number], self.data
    found = self.task.encode(
      record,
      data["template"],
      self.tokenizer,
      self.image_token_id,
      self.tokens_per_image,
      data["max_length"],
    )
    if found.example is None:
      return found
    root = data["images"] or os.path.dirname(record.file)
    paths = tuple(os.path.join(root, path) for path in found.example.images)
    if data["max_images"] and len(set(paths)) > data["max_images"]:
      mend = "split the record" if data["concatenate"] == 1 else "lower data.concatenate"
      raise InputError(
        f"{record.where}: {len(set(paths))} images, data.max_images is {data['max_images']}; "
        f"raise it or {mend}"
      )
    return dataclasses.replace(found, example=dataclasses.replace(found.example, images=paths))

  def measured(self, number: int) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """(tokens, the task's counts, image paths); 0 tokens where nothing is left to learn."""
    found = self.encoded(number)
    if found.example is None:
      return 0, found.counts, ()
    return len(found.example.tokens), found.counts, found.example.images

  def __call__(self, number: int) -> Example:
    return self.encoded(number).example


@dataclasses.dataclass(frozen=True)
class LoadImage:
  """Path -> uint8[H, W, 3] as the vision tower wants it."""

  preprocessor: images.ImagePreprocessor
  blank: bool  # grey instead of the picture

  def __call__(self, path: str) -> np.ndarray:
    size = (self.preprocessor.height, self.preprocessor.width, 3)
    if self.blank:
      return np.full(size, blank.GREY, np.uint8)
    return self.preprocessor.preprocess(
      images.open_image(os.path.dirname(path), os.path.basename(path))
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Planned data, ready to be iterated from any step."""

  plan: plan.BatchPlan
  records: int  # different ones that it shows
  max_answers: int  # K, the most ranked answers of an example; 0 where examples have none
  pipeline: dict  # arguments of `pipeline.batches`

  def batches(self, **options) -> pipeline.Batches:
    """See `pipeline.batches` for the options: start_step, blocks, block_count, on_bad_record."""
    return pipeline.batches(self.plan, **(self.pipeline | options))

  def read(self, **options) -> list[dict[str, np.ndarray]]:
    """Makes every batch once, for the InputError that a bad record raises.

    Returns:
      `segments` and `skipped` of each batch, see `pipeline.batches`.
    """
    with self.batches(**options) as batches:
      return [{name: batch[name] for name in ("segments", "skipped")} for batch in batches]

  @property
  def identity(self) -> dict[str, int]:
    """What tells that a resumed run has the same plan; goes through JSON."""
    return {
      "steps": self.plan.steps,
      "records": self.records,
      "examples": int(self.plan.fingerprints[-1]),
    }

  @property
  def max_segments(self) -> int:
    """S, the most examples in a row."""
    return self.plan.max_segments


def load_records(task: Task, config) -> tuple[mixture.Mixture, tuple[Record, ...]]:
  """The training mixture and the evaluation records of a config; checks every record.

  Raises:
    InputError: a file or record is bad.
  """
  data = config.data
  wanted = {"answers": task.answers, "max_candidates": data.max_candidates}
  train = mixture.load_mixture(
    data.train, data.images, data.samples, data.repeats, config.seed, **wanted
  )
  if data.eval:
    found = mixture.load_samples(
      data.eval, data.images, data.eval_samples, config.seed, "eval", **wanted
    )
    held_out = tuple(itertools.chain(*found))
  elif data.eval_fraction:
    train, held_out = mixture.split_eval(train, data.eval_fraction)
  else:
    held_out = ()
  if data.concatenate > 1:
    train = mixture.concatenate(train, data.concatenate)
  return train, held_out


def prepare_train(
  task: Task, config, source: ModelSource, train: mixture.Mixture, row_multiple: int
) -> Prepared:
  """Plans the whole run: every step of `config.max_steps`, or of `config.num_train_epochs`.

  Raises:
    InputError: there is nothing to learn.
  """
  load, measured = measure_records(task, config, source, train.records, "data.train")
  usable = measured.lengths > 0
  if not np.any(usable & (np.asarray(train.repeats)[train.file_of] > 0)):
    raise _nothing_fits(task, config, "data.train")
  epochs, examples, stream = config.num_train_epochs, 0, []
  by_steps = config.max_steps > 0
  wanted = config.max_steps * config.batch_size if by_steps else None
  while examples < wanted if by_steps else len(stream) < epochs:
    order = mixture.epoch_order(train, len(stream), config.data.shuffle)
    order = order[usable[order]]
    stream.append(order)
    examples += len(order)
  if wanted is None:
    # A broken epoch at the end shows that share of its records.
    wanted = round(examples - len(stream[-1]) * (len(stream) - epochs))
  order = np.concatenate(stream)[: max(1, wanted)]
  if not len(order):  # a weight below 1 has shown none of the few that fit
    raise _nothing_fits(task, config, "data.train")
  return lay_out(config, source, load, measured, order, row_multiple, "data.train")


def prepare_eval(
  task: Task, config, source: ModelSource, records: tuple[Record, ...], row_multiple: int
) -> Prepared | None:
  """Plans one pass over the evaluation records in order; None if there are none.

  Raises:
    InputError: nothing can be learnt from any record.
  """
  if not records:
    return None
  load, measured = measure_records(task, config, source, records, "data.eval")
  order = np.flatnonzero(measured.lengths > 0)
  if not len(order):
    raise _nothing_fits(task, config, "data.eval")
  return lay_out(config, source, load, measured, order, row_multiple, "data.eval")


def _nothing_fits(task: Task, config, name: str) -> InputError:
  return InputError(
    f"{name}: no record that is shown has {task.needs} "
    f"data.max_length={config.data.max_length}; raise it"
  )


# What examples are made by, of the config's `data` group; prediction joins nothing.
_OF_EXAMPLES = ("template", "max_length", "max_images", "images", "concatenate")


def example_loader(task: Task, config, source: ModelSource, records) -> LoadExample:
  """The examples of `records` as a config's `data` group and the model's tokenizer make them.

  Raises:
    InputError: template and tokenizer do not go together.
  """
  templates.check_template(config.data.template, source.tokenizer)
  return LoadExample(
    task,
    SharedList(records),
    {key: config.data.get(key, 1) for key in _OF_EXAMPLES},
    source.tokenizer,
    source.config.image_token_id,
    source.config.tokens_per_image,
  )


def measure_records(task: Task, config, source: ModelSource, records, name: str):
  """(LoadExample, Measured) of all records; says in the log what became of them."""
  load = example_loader(task, config, source, records)
  measured = measure.measure(load.measured, len(records), os.cpu_count() or 1)
  logging.info("%s: %s", name, task.describe(measured, config.data.max_length))
  return load, measured


def lay_out(
  config, source: ModelSource, load, measured, order, row_multiple: int, name: str, **options
) -> Prepared:
  """Plans the examples of `order`; options for `plan.plan_batches` go before the config's."""
  data = config.data
  options = {
    "batch_size": config.batch_size,
    "pack": data.pack,
    "max_length": data.max_length,
    **options,
  }
  planned = plan.plan_batches(
    order,
    measured.lengths,
    measured.images,
    row_multiple=row_multiple,
    max_images_per_row=data.max_images,
    **options,
  )
  statistics = plan.statistics(planned)
  logging.info(
    "%s: %d steps of %s rows x %s tokens, %d images a row; %.1f %% of the tokens are real",
    name,
    planned.steps,
    "/".join(map(str, np.unique(planned.row_counts))),
    "/".join(map(str, np.unique(planned.lengths))),
    planned.images,
    100 * statistics["packing_efficiency"],
  )
  max_answers = int(measured.counts[order, 0].max()) if load.task.answers == "ranked" else 0
  arguments = {
    "load_example": load,
    "load_image": LoadImage(source.images, data.blank_images),
    "image_token_id": source.config.image_token_id,
    "tokens_per_image": source.config.tokens_per_image,
    "image_size": (source.images.height, source.images.width),
    "pad_id": source.tokenizer.pad_token_id,
    "max_segments": planned.max_segments,
    "max_answers": max_answers,
    "on_bad_record": data.on_bad_record,
    "workers": data.workers,
  }
  return Prepared(planned, len(np.unique(order)), max_answers, arguments)
