"""Compares rows with arrays written by hand."""

import numpy as np
import pytest

from vlalign_jax.data.encode import Example
from vlalign_jax.data.rows import build_row, empty_row

IMAGE, PAD = 9, 5
DTYPES = {
  "tokens": np.int32,
  "positions": np.int32,
  "segments": np.int32,
  "branches": np.int32,
  "targets": np.int32,
  "loss_mask": np.float32,
  "image_slots": np.int32,
}


def example(tokens, images=(), branches=None, positions=None):
  n = len(tokens)
  loss_mask = np.zeros(n, np.float32)
  loss_mask[-2:-1] = 1
  return Example(
    tokens=np.array(tokens, np.int32),
    positions=np.array(range(n) if positions is None else positions, np.int32),
    branches=np.array([0] * n if branches is None else branches, np.int32),
    targets=np.array([*tokens[1:], 0], np.int32) * loss_mask.astype(np.int32),
    loss_mask=loss_mask,
    images=tuple(images),
    where="train.json, record 3",
  )


def check(row, expected):
  assert set(row) == set(DTYPES)
  for name, dtype in DTYPES.items():
    assert row[name].dtype == dtype, name
    np.testing.assert_array_equal(row[name], np.array(expected[name], dtype), err_msg=name)


def test_packs_two_examples_with_a_shared_image():
  first = example([1, 9, 9, 9, 9, 2, 3], ["a.jpg", "b.jpg"])  # two images next to each other
  second = example([1, 9, 9, 4], ["b.jpg"])
  row, paths = build_row([first, second], 13, 2, IMAGE, 2, PAD)
  assert paths == ("a.jpg", "b.jpg")
  check(
    row,
    {
      "tokens": [1, 9, 9, 9, 9, 2, 3, 1, 9, 9, 4, 5, 5],
      "positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0, 0],
      "segments": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
      "branches": [0] * 13,
      "targets": [0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0],
      "loss_mask": [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
      "image_slots": [-1, 0, 1, 2, 3, -1, -1, -1, 2, 3, -1, -1, -1],
    },
  )


def test_slots_follow_first_appearance_in_the_row():
  first = example([9, 1], ["z.jpg"])
  second = example([9, 2, 9, 9], ["a.jpg", "z.jpg", "a.jpg"])  # the same image twice
  row, paths = build_row([first, second], 6, 3, IMAGE, 1)
  assert paths == ("z.jpg", "a.jpg")
  np.testing.assert_array_equal(row["image_slots"], [0, -1, 1, -1, 0, 1])


def test_keeps_branches_and_positions_of_an_example():
  pair = example([1, 2, 2, 3, 2, 4], branches=[0, 0, 1, 1, 2, 2], positions=[0, 1, 2, 3, 2, 3])
  row, paths = build_row([example([6, 7]), pair], 10, 0, IMAGE, 4)
  assert paths == ()
  np.testing.assert_array_equal(row["branches"], [0, 0, 0, 0, 1, 1, 2, 2, 0, 0])
  np.testing.assert_array_equal(row["positions"], [0, 1, 0, 1, 2, 3, 2, 3, 0, 0])
  np.testing.assert_array_equal(row["segments"], [1, 1, 2, 2, 2, 2, 2, 2, 0, 0])
  np.testing.assert_array_equal(row["tokens"], [6, 7, 1, 2, 2, 3, 2, 4, 0, 0])


def test_a_row_of_padding():
  expected = {name: [0, 0, 0] for name in DTYPES}
  expected |= {"tokens": [PAD] * 3, "image_slots": [-1] * 3}
  check(empty_row(3, PAD), expected)
  row, paths = build_row([], 3, 4, IMAGE, 2, PAD)
  check(row, expected)
  assert paths == ()


def test_an_exactly_full_row():
  row, _ = build_row([example([1, 2, 3]), example([4])], 4, 0, IMAGE, 2)
  np.testing.assert_array_equal(row["tokens"], [1, 2, 3, 4])
  np.testing.assert_array_equal(row["segments"], [1, 1, 1, 2])


@pytest.mark.parametrize(
  ("examples", "message"),
  [
    ([example([1, 2, 3]), example([1, 2])], "5 tokens in a row of 4"),
    ([example([9, 9], ["a"]), example([9, 9], ["b"])], "2 tiles of distinct images in a row of 1"),
    ([example([9, 1, 2], ["a"])], "record 3: 1 image tokens for 1 images of 2 tokens"),
    # The sum of the two is right; each alone is not.
    ([example([9, 9], []), example([1, 2], ["a"])], "record 3: 2 image tokens for 0 images"),
  ],
)
def test_errors(examples, message):
  with pytest.raises(ValueError, match=message):
    build_row(examples, 4, 1, IMAGE, 2)
