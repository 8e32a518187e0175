"""What tests of prediction share."""

import pytest

from tests.prediction import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory, compile_cache) -> tiny.Tiny:
  """A policy, a reward model and records; what is compiled for them is kept."""
  return tiny.make(str(tmp_path_factory.mktemp("prediction")))
