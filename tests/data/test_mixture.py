"""Tests which records a run sees: samples, weights, epochs and the held-out share."""

import json

import numpy as np
import pytest

from vlalign_jax.data.mixture import (
  concatenate,
  epoch_order,
  load_mixture,
  load_samples,
  split_eval,
)
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import sft
from vlalign_jax.stages import defaults


@pytest.fixture
def files(tmp_path):
  """Writes two files, of 10 and 5 records without images."""
  paths = []
  for name, size in (("a", 10), ("b", 5)):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps([{"id": f"{name}{i}", "conversations": turns} for i in range(size)]))
    paths.append(str(path))
  return ", ".join(paths)


def ids(records):
  return [record.id for record in records]


def shown(mixture, epoch, shuffle=True):
  return [mixture.records[index].id for index in epoch_order(mixture, epoch, shuffle)]


A = [f"a{i}" for i in range(10)]
B = [f"b{i}" for i in range(5)]


def test_everything_once_by_default(files):
  mixture = load_mixture(files, "", "", 0)
  assert ids(mixture.records) == A + B
  assert mixture.file_of.dtype == np.int32
  assert mixture.file_of.tolist() == [0] * 10 + [1] * 5
  assert mixture.repeats == (1.0, 1.0)
  order = epoch_order(mixture, 0, shuffle=False)
  assert order.dtype == np.int64
  assert order.tolist() == list(range(15))


def test_samples_are_a_seeded_choice_in_file_order(files):
  chosen = ids(load_mixture(files, "4,0", "", 1).records)
  assert chosen[4:] == B
  assert len(set(chosen[:4])) == 4
  assert chosen[:4] == sorted(chosen[:4])
  assert chosen == ids(load_mixture(files, " 4 , ", "", 1).records)
  others = {tuple(ids(load_mixture(files, "4,0", "", seed).records)) for seed in range(8)}
  assert len(others) > 4
  assert len(load_mixture(files, "3", "", 1).records) == 6
  assert ids(load_mixture(files, "10,5", "", 1).records) == A + B


def test_evaluation_files_are_sampled_alike(files):
  first, second = load_samples(files, "4,0", 1, "eval")
  assert ids(first + second) == ids(load_mixture(files, "4,0", "", 1).records)
  assert [ids(records) for records in load_samples(files, "", 1, "eval")] == [A, B]
  with pytest.raises(InputError, match="fewer than the 11 of data.eval_samples; lower it"):
    load_samples(files, "11,0", 1, "eval")
  with pytest.raises(InputError, match="data.eval_samples has 3 numbers for 2 files"):
    load_samples(files, "1,2,3", 1, "eval")
  with pytest.raises(InputError, match='data.eval ".*," has an empty path'):
    load_samples(files + ",", "", 1, "eval")


def test_a_config_samples_both_kinds_of_files(files):
  config = defaults("sft")
  config.data.update(train=files, samples="1,2", eval=files, eval_samples="3,0")
  train, evaluation = sft.load_records(config)
  assert [name[0] for name in ids(train.records)] == ["a", "b", "b"]
  assert [name[0] for name in ids(evaluation)] == ["a"] * 3 + ["b"] * 5


def test_every_record_is_sampled_equally_often(files):
  counts = dict.fromkeys(A, 0)
  for seed in range(60):
    for name in ids(load_mixture(files.split(",")[0], "5", "", seed).records):
      counts[name] += 1
  assert all(15 <= count <= 45 for count in counts.values())  # 30 expected, sigma 3.9


def test_weights_repeat_files_and_renew_the_part(files):
  mixture = load_mixture(files, "", "2.5,1", 3)
  parts = []
  for epoch in range(6):
    order = shown(mixture, epoch)
    assert len(order) == 2 * 10 + 5 + 5
    extra = {name for name in A if order.count(name) == 3}
    assert len(extra) == 5
    assert all(order.count(name) == 2 for name in set(A) - extra)
    assert all(order.count(name) == 1 for name in B)
    parts.append(frozenset(extra))
  assert len(set(parts)) > 1
  unshuffled = shown(mixture, 0, shuffle=False)
  assert unshuffled == A + A + sorted(parts[0]) + B


@pytest.mark.parametrize(
  ("weights", "sizes"),
  [("0,2", (0, 10)), ("0.01,1", (1, 5)), ("2.1,1", (21, 5)), ("0.5", (5, 3)), ("1e0,.3", (10, 2))],
)
def test_epoch_sizes(files, weights, sizes):
  mixture = load_mixture(files, "", weights, 0)
  for epoch in range(3):
    names = shown(mixture, epoch)
    assert (sum(name in A for name in names), sum(name in B for name in names)) == sizes


def test_epochs_depend_on_seed_and_epoch_alone(files):
  first, second = (load_mixture(files, "", "1.5,0.5", 5) for _ in range(2))
  later = [epoch_order(first, epoch, True).tolist() for epoch in (2, 1, 0)]
  np.random.seed(1)
  assert later[::-1] == [epoch_order(second, epoch, True).tolist() for epoch in range(3)]
  assert len({tuple(order) for order in later}) == 3
  assert later[2] != epoch_order(load_mixture(files, "", "1.5,0.5", 6), 0, True).tolist()
  assert later[2] != sorted(later[2])


@pytest.mark.parametrize(
  ("samples", "weights", "message"),
  [
    ("11,0", "", "a.json has 10 records, fewer than the 11 of data.samples"),
    ("1,2,3", "", "data.samples has 3 numbers for 2 files"),
    ("1.5,2", "", 'data.samples "1.5,2" is not made of whole numbers'),
    ("-1,2", "", "must be 0 or more"),
    ("", "1,2,3", "data.repeats has 3 numbers for 2 files"),
    ("", "1;2", "is not made of numbers"),
    ("", "-1,2", "must be 0 or more"),
    ("", "nan,1", "must be 0 or more, and finite"),
    ("", "inf,1", "must be 0 or more, and finite"),
    ("", "0", "data.repeats is 0 for every file"),
  ],
)
def test_bad_numbers(files, samples, weights, message):
  with pytest.raises(InputError, match=message):
    load_mixture(files, samples, weights, 0)


def test_bad_files_and_seed(files):
  with pytest.raises(InputError, match="no such file"):
    load_mixture(files + "x", "", "", 0)
  for empty in ("", files + ","):
    with pytest.raises(InputError, match="empty path"):
      load_mixture(empty, "", "", 0)
  with pytest.raises(InputError, match="seed is -1"):
    load_mixture(files, "", "", -1)


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 3), (0.001, 1), (0.999, 14)])
def test_split_holds_out_a_seeded_share(files, fraction, count):
  mixture = load_mixture(files, "", "2,1", 0)
  train, held_out = split_eval(mixture, fraction)
  assert len(held_out) == count
  assert sorted(ids(train.records) + ids(held_out)) == A + B
  assert ids(held_out) == sorted(ids(held_out))
  assert ids(held_out) == ids(split_eval(mixture, fraction)[1])
  assert [mixture.repeats[index] for index in train.file_of] == [
    2.0 if name in A else 1.0 for name in ids(train.records)
  ]
  assert set(shown(train, 0)) == set(ids(train.records))


def test_split_differs_by_seed(files):
  splits = {tuple(ids(split_eval(load_mixture(files, "", "", s), 0.4)[1])) for s in range(6)}
  assert len(splits) > 3


def test_split_keeps_a_record_named_twice_on_one_side(files):
  a = files.split(",")[0]
  mixture = load_mixture(f"{a},{a.replace('a.json', './a.json')}", "", "", 0)
  train, held_out = split_eval(mixture, 0.3)
  assert len(held_out) == 3
  assert sorted(set(ids(train.records)) | set(ids(held_out))) == A
  assert len(train.records) == 14
  assert not set(ids(train.records)) & set(ids(held_out))


def test_split_ignores_files_that_no_epoch_shows(files):
  train, held_out = split_eval(load_mixture(files, "", "0,1", 0), 0.5)
  assert set(ids(held_out)) < set(B)
  assert set(shown(train, 0)) == set(B) - set(ids(held_out))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_fraction(files, fraction):
  with pytest.raises(InputError, match="between 0 and 1"):
    split_eval(load_mixture(files, "", "", 0), fraction)


def test_one_record_cannot_be_split(files):
  with pytest.raises(InputError, match="cannot hold out 0.5 of 1 record"):
    split_eval(load_mixture(files, "1", "0,1", 0), 0.5)


def test_records_of_a_file_are_joined(files):
  mixture = load_mixture(files, "", "1,2", 1)
  joined = concatenate(mixture, 3)
  assert joined.file_of.tolist() == [0] * 4 + [1] * 2
  assert [len(record.turns) for record in joined.records] == [3, 3, 3, 1, 3, 2]
  named = [record.id.split(" + ") for record in joined.records]
  assert sorted(sum(named[:4], [])) == A
  assert sorted(sum(named[4:], [])) == B
  assert named[:4] != [A[0:3], A[3:6], A[6:9], A[9:]]  # neighbors need not belong together
  assert ids(joined.records) == ids(concatenate(mixture, 3).records)
  assert ids(concatenate(mixture, 1).records) != ids(joined.records)
  assert sorted(shown(joined, 0)) == sorted(
    [*ids(joined.records[:4]), *ids(joined.records[4:]) * 2]
  )


def test_joined_records_bring_their_images(tmp_path):
  records = [
    {
      "id": str(number),
      "image": f"{number}.png",
      "conversations": [
        {"from": "human", "value": f"<image>\nq{number}"},
        {"from": "gpt", "value": f"r{number}"},
      ],
    }
    for number in range(2)
  ]
  (tmp_path / "a.json").write_text(json.dumps(records))
  for number in range(2):
    (tmp_path / f"{number}.png").touch()
  (joined,) = concatenate(load_mixture(str(tmp_path / "a.json"), "", "", 0), 2).records
  assert joined.images == ("0.png", "1.png")
  assert [turn.human for turn in joined.turns] == ["<image>\nq0", "<image>\nq1"]
  assert [turn.gpt for turn in joined.turns] == ["r0", "r1"]
  assert '("id": "0 + 1")' in joined.where


def test_held_out_records_stay_alone(files):
  config = defaults("sft")
  config.data.update({"train": files, "concatenate": 5, "eval_fraction": 0.2})
  train, held_out = sft.load_records(config)
  assert [len(record.turns) for record in held_out] == [1] * 3
  assert sum(len(record.turns) for record in train.records) == 12
  assert max(len(record.turns) for record in train.records) == 5
