"""Fixtures of the tests of generation."""

import pytest

from tests.generation import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> tiny.Tiny:
  return tiny.make(str(tmp_path_factory.mktemp("llava")))
