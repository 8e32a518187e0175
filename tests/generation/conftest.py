"""Fixtures of the tests of generation."""

import pytest

from tests.generation import tiny_llava


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> tiny_llava.Tiny:
  return tiny_llava.make(str(tmp_path_factory.mktemp("llava")))
