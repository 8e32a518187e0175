"""Fixtures of the tests of prediction."""

import pytest

from tests.prediction import policy_and_reward


@pytest.fixture(scope="session")
def models(tmp_path_factory, compile_cache) -> policy_and_reward.Tiny:
  """Returns a policy, a reward model and records; their compiled programs are cached."""
  return policy_and_reward.make(str(tmp_path_factory.mktemp("prediction")))
