"""Tests that files are compared by all of their bytes."""

import os

import numpy as np

from vlalign_jax.weights import identity, provenance

MIB = 2**20


def write(path, content: np.ndarray) -> str:
  path.write_bytes(content.tobytes())
  return str(path)


def test_only_files_of_equal_content_share_a_name(tmp_path):
  content = np.random.default_rng(0).integers(0, 256, 8 * MIB, dtype=np.uint8)
  other = content.copy()
  other[MIB // 4] ^= 1  # where no sample is taken
  original = write(tmp_path / "original", content)
  copy = write(tmp_path / "copy", content)
  differing = write(tmp_path / "differing", other)
  os.symlink(original, tmp_path / "link")
  assert provenance.fingerprint(original) == provenance.fingerprint(differing)

  files = identity.Files()
  name = files.name(original)
  assert files.name(copy) == name
  assert files.name(str(tmp_path / "link")) == name
  assert files.name(differing) not in (name, copy)
  assert files.name(write(tmp_path / "again", other)) == files.name(differing)
