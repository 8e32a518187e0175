"""What the tests of records share."""

import pytest
from PIL import Image


@pytest.fixture
def directory(tmp_path):
  """Returns a directory with the pictures a.png and b.png."""
  for name, color in (("a.png", (0, 120, 120)), ("b.png", (180, 60, 10))):
    Image.new("RGB", (20, 20), color).save(tmp_path / name)
  return tmp_path
