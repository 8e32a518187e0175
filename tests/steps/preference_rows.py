"""Preference examples drawn at random: with a shared prompt, and as sequences of their own."""

from typing import NamedTuple

import numpy as np

from tests import parity
from vlalign_jax.data import rows as layouts
from vlalign_jax.data.encode import Example
from vlalign_jax.models import vlm


class Preference(NamedTuple):
  """An example: the prompt once with its answers behind it, and each answer behind its own prompt.

  In the latter everything is of branch 0, as in SFT.
  """

  shared: Example
  separate: list[Example]


def make_preference(
  config: vlm.ModelConfig, prompt: int, answers: list[int], images: tuple[str, ...], seed: int
) -> Preference:
  """A prompt of `prompt` text tokens with images between, and answers of so many tokens."""
  rng = np.random.default_rng(seed + 1000)
  trunk = parity.make_example(config, prompt, images, seed).tokens
  drawn = [rng.integers(0, config.image_token_id, n).astype(np.int32) for n in answers]
  separate = [_sequence(np.concatenate([trunk, answer]), len(trunk), images) for answer in drawn]
  before = len(trunk) - 1
  # Of each sequence, what comes behind the shared part; then all one after the other.
  names = ("tokens", "positions", "targets", "loss_mask")
  parts = {
    name: np.concatenate(
      [getattr(separate[0], name)[:before], *(getattr(one, name)[before:] for one in separate)]
    )
    for name in names
  }
  sizes = [1 + n for n in answers]
  shared = Example(
    **parts,
    branches=np.repeat(np.arange(len(sizes) + 1), [before, *sizes]).astype(np.int32),
    images=images,
    where="drawn at random",
    answers=(before + np.cumsum(sizes) - 1).astype(np.int32),
  )
  return Preference(shared, separate)


def _sequence(tokens: np.ndarray, prompt: int, images: tuple[str, ...]) -> Example:
  """Tokens of which all behind the first `prompt` are the answer."""
  learned = (np.arange(len(tokens)) >= prompt - 1) & (np.arange(len(tokens)) < len(tokens) - 1)
  return Example(
    tokens=tokens,
    positions=np.arange(len(tokens), dtype=np.int32),
    branches=np.zeros(len(tokens), np.int32),
    targets=np.where(learned, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=learned.astype(np.float32),
    images=images,
    where="drawn at random",
  )


def shared_rows(
  config: vlm.ModelConfig, preferences: list[Preference], layout: list[list[int]], pictures
) -> dict[str, np.ndarray]:
  """Returns a batch as training has it; `layout` lists the numbers of each row's examples."""
  held = [[preferences[n].shared for n in numbers] for numbers in layout]
  length = max(sum(len(example.tokens) for example in row) for row in held)
  images = max(len({path for example in row for path in example.images}) for row in held)
  rows = parity.make_rows(config, held, pictures, length, images)
  segments = max(map(len, layout))
  candidates = max(len(preference.separate) for preference in preferences)
  places = [
    layouts.answer_places(row, numbers, segments, candidates)
    for row, numbers in zip(held, layout, strict=True)
  ]
  return rows | {name: np.stack([place[name] for place in places]) for name in places[0]}


def separate_rows(
  config: vlm.ModelConfig, preferences: list[Preference], pictures
) -> dict[str, np.ndarray]:
  """A row for each answer, those of an example one after the other, best first."""
  held = [[example] for preference in preferences for example in preference.separate]
  length = max(len(row[0].tokens) for row in held)
  images = max(len(row[0].images) for row in held)
  return parity.make_rows(config, held, pictures, length, images)


def answer_numbers(preferences: list[Preference]) -> np.ndarray:
  """int[N, K], the row in `separate_rows` of each answer; -1 where there is none."""
  candidates = max(len(preference.separate) for preference in preferences)
  numbers = np.full((len(preferences), candidates), -1)
  row = 0
  for n, preference in enumerate(preferences):
    K = len(preference.separate)
    numbers[n, :K] = np.arange(row, row + K)
    row += K
  return numbers
