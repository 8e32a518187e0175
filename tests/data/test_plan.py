"""Tests that plans show every example once an epoch, within the limits, in few shapes."""

import collections
import itertools
import pickle
import time

import numpy as np
import pytest

from vlalign_jax.data.plan import ImageSets, default_buckets, plan_batches, statistics


def random_data(n, longest, seed, num_images=None):
  """Returns lengths and image paths, the paths out of `num_images` if that is given."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest + 1, n).astype(np.int32)
  paths = [
    [str(rng.integers(num_images)) if num_images else f"{e}-{i}" for i in range(rng.integers(4))]
    for e in range(n)
  ]
  return lengths, paths


def epochs(n, count, seed=0):
  rng = np.random.default_rng(seed)
  return np.concatenate([rng.permutation(n) for _ in range(count)])


def examples_of(plan, step):
  return [e for row in range(plan.rows) for e in plan.rows_of(step, row).tolist()]


def check_limits(plan, lengths, paths, max_images):
  """Counts tokens and images of every row anew."""
  most, tokens = 0, np.zeros(plan.steps, np.int64)
  for step in range(plan.steps):
    for row in range(plan.rows):
      examples = plan.rows_of(step, row)
      used = sum(int(lengths[e]) for e in examples)
      assert used <= plan.lengths[step]
      tokens[step] += used
      distinct = len({path for e in examples for path in paths[e]})
      assert plan.row_images[step * plan.rows + row] == distinct
      most = max(most, distinct)
      assert row < plan.row_counts[step] or not used
  assert most == plan.images
  assert max_images is None or most <= max_images
  np.testing.assert_array_equal(plan.tokens, tokens)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
  ("num_images", "max_images"), [(None, None), (None, 3), (5, 3), (5, 4), (40, 6)]
)
def test_each_step_has_its_own_examples_within_the_limits(pack, num_images, max_images):
  n, batch_size = 203, 16
  lengths, paths = random_data(n, 300, 1, num_images)
  order = epochs(n, 3)
  plan = plan_batches(
    order,
    lengths,
    ImageSets.from_paths(paths),
    batch_size=batch_size,
    max_length=300,
    row_multiple=4,
    pack=pack,
    max_images_per_row=max_images,
  )
  assert plan.steps == -(-order.size // batch_size)
  assert plan.rows % 4 == 0
  for step in range(plan.steps):  # the next of the order; the last step has the rest
    expected = order[step * batch_size : (step + 1) * batch_size].tolist()
    assert sorted(examples_of(plan, step)) == sorted(expected)
  seen = collections.Counter(e for step in range(plan.steps) for e in examples_of(plan, step))
  assert seen == dict.fromkeys(range(n), 3)
  check_limits(plan, lengths, paths, max_images)


def test_first_fit_decreasing_by_hand():
  # Longest first: 60 | 50 in two rows, 40 with the 60 (now full), then 30 and 10 with the 50.
  lengths = np.array([10, 60, 50, 40, 30], np.int32)
  plan = plan_batches(
    np.arange(5),
    lengths,
    ImageSets.from_paths([()] * 5),
    batch_size=5,
    max_length=100,
    row_multiple=1,
    pack=True,
    buckets=[100],
  )
  assert [sorted(plan.rows_of(0, row).tolist()) for row in range(plan.rows)] == [[1, 3], [0, 2, 4]]
  assert plan.lengths.tolist() == [128]  # the fullest row, 100, rounded up
  assert plan.images == 0


def optimal_rows(lengths, paths, length, max_images):
  """Returns the fewest rows by trying every assignment."""
  n = len(lengths)
  for rows in range(1, n + 1):
    for choice in itertools.product(range(rows), repeat=n):
      packed = [[e for e in range(n) if choice[e] == row] for row in range(rows)]
      if all(
        sum(lengths[e] for e in row) <= length
        and len({path for e in row for path in paths[e]}) <= max_images
        for row in packed
      ):
        return rows
  raise AssertionError


@pytest.mark.parametrize("seed", range(6))
def test_close_to_the_fewest_rows(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(5, 60, 6)
  paths = [[str(rng.integers(3))] for _ in range(6)]
  plan = plan_batches(
    np.arange(6),
    lengths,
    ImageSets.from_paths(paths),
    batch_size=6,
    max_length=64,
    row_multiple=1,
    pack=True,
    max_images_per_row=2,
    buckets=[64],
  )
  assert plan.rows <= optimal_rows(lengths, paths, 64, 2) + 1


def test_an_image_that_a_row_already_has_takes_no_room():
  images = ImageSets.from_paths([["a"], ["b"], ["a"], ["b", "a"]])
  arguments = {
    "batch_size": 4,
    "max_length": 64,
    "row_multiple": 1,
    "pack": True,
    "buckets": [64],
  }
  lengths = np.full(4, 16, np.int32)
  shared = plan_batches(np.arange(4), lengths, images, max_images_per_row=2, **arguments)
  assert (shared.rows, shared.images) == (1, 2)
  different = ImageSets.from_paths([["a"], ["b"], ["c"], ["d", "e"]])
  separate = plan_batches(np.arange(4), lengths, different, max_images_per_row=2, **arguments)
  assert (separate.rows, separate.images) == (3, 2)
  assert plan_batches(np.arange(4), lengths, different, **arguments).images == 5


def test_unpacked_has_one_example_a_row_and_few_lengths():
  n = 500
  lengths, paths = random_data(n, 1000, 2)
  lengths[::2] = lengths[::2] // 20 + 1
  plan = plan_batches(
    epochs(n, 2),
    lengths,
    ImageSets.from_paths(paths),
    batch_size=3,
    max_length=1000,
    row_multiple=2,
    pack=False,
  )
  assert default_buckets(1000) == [128, 256, 512, 1024]
  assert plan.rows == 4
  assert np.diff(plan.offsets).max() == 1
  assert set(plan.lengths.tolist()) == {128, 256, 512, 1024}
  for step in range(plan.steps):
    longest = max(lengths[e] for e in examples_of(plan, step))
    fitting = [bucket for bucket in (128, 256, 512, 1024) if bucket >= longest]
    assert plan.lengths[step] == fitting[0]
  assert default_buckets(50) == [64]


def test_packed_has_one_shape():
  lengths, paths = random_data(300, 200, 3)
  plan = plan_batches(
    epochs(300, 2),
    lengths,
    ImageSets.from_paths(paths),
    batch_size=32,
    max_length=256,
    row_multiple=8,
    pack=True,
  )
  assert len(set(plan.lengths.tolist())) == 1
  assert plan.lengths[0] % 64 == 0


def test_short_data_does_not_make_long_empty_rows():
  # Eight devices, a batch that one row of max_length would hold: seven would learn nothing.
  plan = plan_batches(
    np.arange(8),
    np.full(8, 100, np.int32),
    ImageSets.from_paths([()] * 8),
    batch_size=8,
    max_length=1024,
    row_multiple=8,
    pack=True,
  )
  assert (plan.rows, plan.lengths.tolist()) == (8, [128])
  assert np.diff(plan.offsets).tolist() == [1] * 8


def test_blocks_of_rows_get_like_loads():
  lengths, _ = random_data(64 * 20, 500, 4)
  plan = plan_batches(
    np.arange(len(lengths)),
    lengths,
    ImageSets.from_paths([()] * len(lengths)),
    batch_size=64,
    max_length=512,
    row_multiple=4,
    pack=True,
  )
  for step in range(plan.steps):
    loads = [
      sum(
        int(lengths[plan.rows_of(step, row)].sum())
        for row in range(
          block * plan.row_counts[step] // 4, (block + 1) * plan.row_counts[step] // 4
        )
      )
      for block in range(4)
    ]
    assert max(loads) - min(loads) <= 2 * plan.lengths[step]


def test_steps_take_one_of_three_numbers_of_rows_each_as_few_as_that_allows():
  lengths, _ = random_data(64 * 40, 500, 7)
  keywords = {"batch_size": 64, "max_length": 512, "pack": True, "buckets": [512]}
  images = ImageSets.from_paths([()] * len(lengths))
  for multiple in (1, 4):
    plan = plan_batches(np.arange(len(lengths)), lengths, images, row_multiple=multiple, **keywords)
    needed = np.array(
      [
        -(-sum(len(plan.rows_of(step, row)) > 0 for row in range(plan.rows)) // multiple) * multiple
        for step in range(plan.steps)
      ]
    )
    distinct = np.unique(needed)
    assert np.all(plan.row_counts >= needed)
    assert np.all(plan.row_counts % multiple == 0)
    assert len(np.unique(plan.row_counts)) == min(3, len(distinct))
    best = min(
      sum(min(count for count in chosen if count >= need) for need in needed)
      for size in (1, 2, 3)
      for chosen in itertools.combinations(distinct, size)
      if chosen[-1] == distinct[-1]
    )
    assert plan.row_counts.sum() == best


def test_the_checksum_depends_on_examples_and_not_on_packing():
  lengths, paths = random_data(100, 200, 5)
  images = ImageSets.from_paths(paths)
  arguments = {"lengths": lengths, "images": images, "max_length": 256}
  order = epochs(100, 2)
  plan = plan_batches(order, batch_size=10, row_multiple=1, pack=True, **arguments)
  other = plan_batches(order[:150], batch_size=10, row_multiple=4, pack=False, **arguments)
  np.testing.assert_array_equal(plan.fingerprints[:16], other.fingerprints)
  order[35] = order[36]
  changed = plan_batches(order, batch_size=10, row_multiple=1, pack=True, **arguments)
  equal = changed.fingerprints == plan.fingerprints
  assert equal[:4].all()
  assert not equal[4:].any()


def test_statistics_by_hand():
  plan = plan_batches(
    np.arange(3),
    np.array([64, 32, 48], np.int32),
    ImageSets.from_paths([["a"], ["b"], []]),
    batch_size=2,
    max_length=64,
    row_multiple=2,
    pack=True,
  )
  assert statistics(plan) == {
    "steps": 2,
    "rows": 2,
    "images_per_row": 1,
    "shapes": 1,
    "tokens": 144,
    "packing_efficiency": 144 / 256,
    "image_efficiency": 0.5,
    "empty_rows": 0.25,
    "examples_per_row": 1.0,
  }


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"order": np.zeros(0, np.int64)}, "no examples"),
    ({"max_length": 63}, "example 1 has 64 tokens; 1 to 63"),
    ({"lengths": np.array([3, 0], np.int32)}, "example 1 has 0 tokens"),
    ({"max_images_per_row": 1}, "example 0 has 2 tiles of images; a row takes 1"),
    ({"buckets": [32]}, "64 tokens does not fit"),
  ],
)
def test_errors(change, message):
  arguments = {
    "order": np.arange(2),
    "lengths": np.array([3, 64], np.int32),
    "images": ImageSets.from_paths([["a", "b"], []]),
    "batch_size": 2,
    "max_length": 64,
    "row_multiple": 1,
    "pack": True,
  }
  with pytest.raises(ValueError, match=message):
    plan_batches(**(arguments | change))


def test_a_large_plan_is_quick_and_compact():
  n = 100_000
  rng = np.random.default_rng(6)
  lengths = rng.integers(200, 900, n).astype(np.int32)
  images = ImageSets(np.arange(n + 1), rng.integers(0, n // 4, n).astype(np.int32))
  start = time.perf_counter()
  plan = plan_batches(
    rng.permutation(n),
    lengths,
    images,
    batch_size=128,
    max_length=2048,
    row_multiple=8,
    pack=True,
    max_images_per_row=3,
  )
  assert time.perf_counter() - start < 10
  assert len(pickle.dumps(plan)) < 24 * n
  assert statistics(plan)["packing_efficiency"] > 0.8
