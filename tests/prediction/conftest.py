"""Fixtures of the tests of prediction."""

import pytest

from tests.prediction import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory, compile_cache) -> tiny.Tiny:
  """Returns a policy, a reward model and records; their compiled programs are cached."""
  return tiny.make(str(tmp_path_factory.mktemp("prediction")))
