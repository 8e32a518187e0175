"""Plans batches from a config's `data` group and a task, which encodes the records."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from vlalign_jax.data import (
  bad_records,
  blank,
  image_processor,
  images,
  measure,
  mixture,
  plan,
  templates,
)
from vlalign_jax.data.conversations import Answers
from vlalign_jax.data.encode import Encoded
from vlalign_jax.data.picture_tokens import PictureLayout
from vlalign_jax.data.pipeline import Prepared
from vlalign_jax.data.records import Options, Record
from vlalign_jax.data.workers import SharedList
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import picture_sizes
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of training data, such as conversations or rankings.

  Attributes:
    answers: what a record's last question must have, see `records.Options`.
    encode: encodes a record; arguments as for `encode.encode`.
    describe: (Measured, max_length) -> what was kept and left out, for the log.
    needs: what a record needs so that it can be learned from, for errors.
  """

  answers: Answers
  encode: Callable[..., Encoded]
  describe: Callable[[measure.Measured, int], str]
  needs: str


@dataclasses.dataclass(frozen=True)
class LoadExample:
  """Loads an example by its number: encodes the record, and makes its image paths full ones."""

  task: Task
  records: SharedList
  data: dict  # template, max_length, max_images, concatenate
  tokenizer: Any
  layout: PictureLayout

  def encoded(self, number: int) -> Encoded:
    """Encodes a record by `task.encode`.

    Raises:
      InputError: the record does not go with the template, or has too many images.
    """
    record, data = self.records[number], self.data
    encoded = self.task.encode(
      record, data["template"], self.tokenizer, self.layout, data["max_length"]
    )
    if encoded.example is None:
      return encoded
    paths = record.image_files[: len(encoded.example.images)]  # of the turns that are kept
    example = dataclasses.replace(encoded.example, images=paths)
    tiles = sum(example.tiles.values())
    if data["max_images"] and tiles > data["max_images"]:
      fix = "split the record" if data["concatenate"] == 1 else "lower data.concatenate"
      count = f"{tiles} {'tiles of ' if self.layout.most_tiles > 1 else ''}images"
      raise InputError(
        f"{record.where}: {count}, data.max_images is {data['max_images']}; raise it or {fix}"
      )
    return dataclasses.replace(encoded, example=example)

  def measured(self, number: int) -> tuple[int, tuple[int, ...], dict[str, int]]:
    """Returns (tokens, the task's counts, image path -> tiles); 0 tokens: nothing is to learn."""
    encoded = self.encoded(number)
    if encoded.example is None:
      return 0, encoded.counts, {}
    return len(encoded.example.tokens), encoded.counts, encoded.example.tiles

  def __call__(self, number: int) -> Any:
    """Returns an Example; None if nothing of the record is left."""
    return self.encoded(number).example


@dataclasses.dataclass(frozen=True)
class LoadImage:
  """Loads the image at a path as uint8[n, H, W, 3] for the vision tower, n tiles.

  Attributes:
    preprocessor: of the model.
    layout: of the model.
    blank: gray in place of the image.
  """

  preprocessor: image_processor.ImagePreprocessor
  layout: PictureLayout
  blank: bool

  def __call__(self, path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Loads an image.

    Args:
      path: of the image.
      size: its width and height by the plan; None: any.

    Raises:
      InputError: it cannot be decoded, or has another size.
    """
    if self.blank:
      tiles = self.layout.tokens_of(size).tiles
      return np.full(
        (tiles, self.preprocessor.height, self.preprocessor.width, 3), blank.GRAY, np.uint8
      )
    image = images.open_image(path)
    images.check_size(path, image, size)
    return self.preprocessor.tiles(image)


def record_options(data, answers: Answers, keeps_columns: bool = False) -> Options:
  """Returns how the records of a config's `data` group are read."""
  return Options(
    image_root=data.images,
    answers=answers,
    max_candidates=data.get("max_candidates"),
    placeholders=data.placeholders,
    cache=data.cache,
    on_bad_record=data.on_bad_record,
    max_bad_records=data.max_bad_records,
    keeps_columns=keeps_columns,
  )


def load_records(
  task: Task, config, keeps_columns: bool = False
) -> tuple[mixture.Mixture, tuple[Record, ...]]:
  """Returns the training mixture and the evaluation records of a config; checks every record.

  Args:
    task: of the stage.
    config: of the run.
    keeps_columns: whether records keep all their columns, for reward functions.

  Raises:
    InputError: a file or record is bad.
  """
  data = config.data
  options = record_options(data, task.answers, keeps_columns)
  train = mixture.load_mixture(data.train, data.samples, data.repeats, config.seed, options)
  if data.eval:
    by_file = mixture.load_samples(data.eval, data.eval_samples, config.seed, "eval", options)
    held_out = tuple(itertools.chain(*by_file))
  elif data.eval_fraction:
    train, held_out = mixture.split_eval(train, data.eval_fraction)
  else:
    held_out = ()
  if data.concatenate > 1:
    train = mixture.concatenate(train, data.concatenate)
  return train, held_out


def prepare_train(
  task: Task,
  config,
  source: ModelSource,
  train: mixture.Mixture,
  row_multiple: int,
  workdir: str = "",
) -> Prepared:
  """Plans all steps of a run, as many as `config.max_steps` or `config.num_train_epochs` says.

  Args:
    task: of the stage.
    config: of the run.
    source: the model.
    train: the records.
    row_multiple: the number of rows of a step is a multiple of this.
    workdir: the run directory; see `example_loader`.

  Raises:
    InputError: nothing can be learned from any record.
  """
  load, measured = measure_records(task, config, source, train.records, "data.train", workdir)
  usable = measured.lengths > 0
  if not np.any(usable & (np.asarray(train.repeats)[train.file_of] > 0)):
    raise _nothing_fits(task, config, "data.train")
  epochs, examples, orders = config.num_train_epochs, 0, []
  by_steps = config.max_steps > 0
  needed = config.max_steps * config.batch_size if by_steps else 0
  while examples < needed if by_steps else len(orders) < epochs:
    order = mixture.epoch_order(train, len(orders), config.data.shuffle)
    order = order[usable[order]]
    orders.append(order)
    examples += len(order)
  if not by_steps:
    # A partial last epoch shows that share of its records.
    needed = round(examples - len(orders[-1]) * (len(orders) - epochs))
  order = np.concatenate(orders)[: max(1, needed)]
  if not len(order):  # none of the few records that fit was in a partial pass over its file
    raise _nothing_fits(task, config, "data.train")
  return lay_out(config, source, load, measured, order, row_multiple, "data.train")


def prepare_eval(
  task: Task,
  config,
  source: ModelSource,
  records: tuple[Record, ...],
  row_multiple: int,
  workdir: str = "",
) -> Prepared | None:
  """Plans one pass over the evaluation records in order; None if there are none.

  Arguments are those of `prepare_train`.

  Raises:
    InputError: nothing can be learned from any record.
  """
  if not records:
    return None
  load, measured = measure_records(task, config, source, records, "data.eval", workdir)
  order = np.flatnonzero(measured.lengths > 0)
  if not len(order):
    raise _nothing_fits(task, config, "data.eval")
  return lay_out(config, source, load, measured, order, row_multiple, "data.eval")


def _nothing_fits(task: Task, config, name: str) -> InputError:
  return InputError(
    f"{name}: no record that is shown has {task.needs} "
    f"data.max_length={config.data.max_length}; raise it"
  )


# The keys of the config's `data` group that examples depend on; prediction has no `concatenate`.
_EXAMPLE_KEYS = ("template", "max_length", "max_images", "concatenate")


def example_loader(
  task: Task, config, source: ModelSource, records, workdir: str = ""
) -> LoadExample:
  """Returns a loader of the examples of `records`, by a config and the model's tokenizer.

  Args:
    task: of the stage.
    config: of the run.
    source: the model.
    records: to be encoded.
    workdir: keeps what is read of pictures, see `picture_sizes.with_sizes`.

  Raises:
    InputError: template and tokenizer do not go together.
  """
  templates.check_template(config.data.template, source.tokenizer)
  return LoadExample(
    task,
    SharedList(picture_sizes.with_sizes(records, source.layout, workdir)),
    {key: config.data.get(key, 1) for key in _EXAMPLE_KEYS},
    source.tokenizer,
    source.layout,
  )


def measure_records(task: Task, config, source: ModelSource, records, name: str, workdir: str = ""):
  """Returns (LoadExample, Measured) of all records; logs what was kept and left out.

  Raises:
    InputError: a record does not go with the template, unless data.on_bad_record leaves it out.
  """
  load = example_loader(task, config, source, records, workdir)
  skips = config.data.on_bad_record == "skip"
  measured = measure.measure(load.measured, len(records), os.cpu_count() or 1, skips=skips)
  bad_records.warn(name, measured.problems)
  bad_records.check(name, len(measured.problems), len(records), config.data)
  logging.info("%s: %s", name, task.describe(measured, config.data.max_length))
  return load, measured


def lay_out(
  config, source: ModelSource, load, measured, order, row_multiple: int, name: str, **options
) -> Prepared:
  """Plans the examples of `order`; the options of `plan.plan_batches` override the config's."""
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
    "%s: %d steps of %s rows x %s tokens, %s %s a row; %.1f %% of the tokens and %.1f %% of the "
    "places for pictures are used",
    name,
    planned.steps,
    "/".join(map(str, np.unique(planned.row_counts))),
    "/".join(map(str, np.unique(planned.lengths))),
    "/".join(map(str, np.unique(planned.image_counts))),
    "tiles of images" if source.layout.most_tiles > 1 else "images",
    100 * statistics["packing_efficiency"],
    100 * statistics["image_efficiency"],
  )
  max_answers = int(measured.counts[order, 0].max()) if load.task.answers == "ranked" else 0
  return Prepared(
    plan=planned,
    load_example=load,
    load_image=LoadImage(source.images, source.layout, data.blank_images),
    image_token_id=source.config.image_token_id,
    tokens_per_image=source.config.tokens_per_image,
    image_size=(source.images.height, source.images.width),
    pad_id=source.tokenizer.pad_token_id,
    records=len(np.unique(order)),
    max_answers=max_answers,
    on_bad_record=data.on_bad_record,
    workers=data.workers,
  )
