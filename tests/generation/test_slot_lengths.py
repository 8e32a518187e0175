"""Slots are as long as the prompts that they are for."""

import jax
import numpy as np
import pytest

from vlalign_jax.generation import memory
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.generation.slot_lengths import slot_lengths
from vlalign_jax.generation.slots import make_slots


def test_shares_of_slots_are_those_of_prompts_but_for_one():
  lengths = np.repeat([50, 100, 900, 2000], [50, 25, 15, 10])
  found = slot_lengths(lengths, 20)
  # Quarters of the prompts end at 50, 50, 100 and 2000 tokens.
  assert found == (64,) * 9 + (112,) * 5 + (2000,) * 6
  rng = np.random.default_rng(0)
  assert slot_lengths(rng.permutation(lengths), 20) == found


@pytest.mark.parametrize("slots", [1, 2])
def test_few_slots_take_every_prompt(slots):
  assert slot_lengths(np.array([3, 700, 5, 9]), slots) == (704,) * slots


def test_equal_prompts_need_slots_of_one_length():
  assert slot_lengths(np.full(9, 130), 5) == (144,) * 5


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_bytes_are_stated_as_they_are_allocated(cache_dtype, model):
  sampling, lengths = Sampling(9, num_return_sequences=2, cache_dtype=cache_dtype), (16, 16, 48)
  state = jax.eval_shape(lambda: make_slots(model.config, sampling).empty(lengths))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
  groups = ((2, 16), (1, 48))
  assert memory.cache_bytes(model.config, sampling, groups, "float32") == held
