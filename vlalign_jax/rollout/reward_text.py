"""Text for a reward model that has another tokenizer, template or picture size than the actor."""

import dataclasses
from typing import Any

import numpy as np

from vlalign_jax.data import templates
from vlalign_jax.data.plan import LENGTH_MULTIPLE
from vlalign_jax.data.records import Record
from vlalign_jax.data.rows import answer_places, build_row
from vlalign_jax.input_pipeline.prepare import LoadImage
from vlalign_jax.input_pipeline.scored_answers import encode_answers
from vlalign_jax.sharding import hosts
from vlalign_jax.weights.source import ModelSource


@dataclasses.dataclass(frozen=True)
class TextReader:
  """Makes batches for a reward model from prompts and answers as text.

  Attributes:
    source: the reward model.
    template: in which it reads.
    images: of every row, in tiles.
    answers: N, to each prompt.
    blank: whether it sees gray pictures, `ppo.blank_images`.
  """

  source: ModelSource
  template: str
  images: int
  answers: int
  blank: bool = False

  def check(self) -> None:
    """Raises an InputError unless template and tokenizer go together."""
    templates.check_template(self.template, self.source.tokenizer)

  def rows(self, records: list[Record | None], texts: list[list[str]]) -> dict[str, np.ndarray]:
    """Returns a batch with one prompt a row, and `answers` int32[B, 1, N]; see ARCHITECTURE.md.

    All hosts call it together, each for its own rows, which have one length on all of them. An
    answer that was cut gets the end token that the template writes after every answer.

    Args:
      records: of each row; None for rows of padding.
      texts: N answers to each.

    Raises:
      InputError: a record does not go with the template, or a picture cannot be read.
    """
    examples = [
      [] if record is None else [self._example(record, answers)]
      for record, answers in zip(records, texts, strict=True)
    ]
    longest = max((len(example.tokens) for row in examples for example in row), default=1)
    longest, length = hosts.greatest(longest), LENGTH_MULTIPLE
    while length < longest:
      length *= 2  # few lengths, so that few shapes are compiled
    model, processor = self.source.config, self.source.images
    size = self.images, processor.height, processor.width, 3
    pixels = np.zeros((len(records), *size), np.uint8)
    rows, load = [], LoadImage(processor, self.source.layout, self.blank)
    for place, row in enumerate(examples):
      arrays, paths = build_row(
        row,
        length,
        self.images,
        model.image_token_id,
        model.tokens_per_image,
        self.source.tokenizer.pad_token_id,
      )
      rows.append(arrays | answer_places(row, [0] * len(row), 1, self.answers))
      shown = {
        path: picture.size
        for example in row
        for path, picture in zip(example.images, example.pictures, strict=True)
      }
      if paths:
        tiles = np.concatenate([load(path, shown[path]) for path in paths])
        pixels[place, : len(tiles)] = tiles
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    del batch["examples"]
    return batch | {"images": pixels}

  def _example(self, record: Record, answers: list[str]):
    *before, last = record.turns
    record = dataclasses.replace(
      record, turns=(*before, dataclasses.replace(last, gpt=None)), answers=tuple(answers)
    )
    options = self.template, self.source.tokenizer, self.source.layout, 2**31 - 1
    example: Any = encode_answers(record, *options).example
    return dataclasses.replace(example, images=record.image_files)
