"""What the tests of bad inputs share: calls that fail, and what they leave behind."""

import os

import pytest

from vlalign_jax.errors import InputError


def fails(expected: list[str], call, *args, **kwargs) -> str:
  """Calls; checks that one short line of error has all of `expected`; returns it."""
  with pytest.raises(InputError) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  for part in expected:
    assert part in message
  assert "\n" not in message
  assert len(message) <= 400 or message.startswith("out of memory")  # its advice is a list
  return message


def saved_steps(tmp_path) -> list[int]:
  return sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
