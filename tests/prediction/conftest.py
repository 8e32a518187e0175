"""What tests of prediction share."""

import pytest

from tests.prediction import policy_and_reward


@pytest.fixture(scope="session")
def models(tmp_path_factory, compile_cache) -> policy_and_reward.Tiny:
  """A policy, a reward model and records; what is compiled for them is kept."""
  return policy_and_reward.make(str(tmp_path_factory.mktemp("prediction")))
