"""How many places for a prompt each slot has, so that few places stay empty."""

import numpy as np

from vlalign_jax.input_pipeline.prompts import row_lengths


def slot_lengths(prompt_lengths: np.ndarray, slots: int) -> tuple[int, ...]:
  """Returns the places for a prompt of each slot of a device, ascending, at most four different.

  Slots are as long as prompts are: a share of the shortest prompts gets that share of the slots,
  but for one slot, which is as long as the next ones. For long prompts wait for long slots, while
  short prompts fit everywhere.

  Args:
    prompt_lengths: int[P], tokens of all prompts.
    slots: of a device.
  """
  ordered = np.sort(prompt_lengths)
  lengths = np.array(row_lengths(ordered))
  last = [min(len(ordered), -(-len(ordered) * (slot + 2) // slots)) - 1 for slot in range(slots)]
  return tuple(int(lengths[np.searchsorted(lengths, ordered[place])]) for place in last)
