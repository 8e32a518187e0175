"""Tensors are read into shards: the right values, and each byte by who needs it alone."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from tests.processes import Processes
from vlalign_jax.weights import names, shards, tensors

LAYERS, OUT, IN = 4, 24, 16


@pytest.fixture
def stored(tmp_path):
  rng = np.random.default_rng(0)
  written = {f"w.{i}": rng.normal(size=(OUT, IN)).astype(ml_dtypes.bfloat16) for i in range(LAYERS)}
  save_file(written, tmp_path / "model.safetensors")
  read = tensors.read_headers(str(tmp_path / "model.safetensors"), str)
  return [written[f"w.{i}"] for i in range(LAYERS)], [read[f"w.{i}"] for i in range(LAYERS)]


def _place(name, found, shape, dtype, spec, vocabulary=0):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
  leaf = jax.ShapeDtypeStruct(shape, dtype)
  with shards.readers() as pool:
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return shards.place(name, found, leaf, place, vocabulary, pool)


@pytest.mark.parametrize("block", [2**21, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  "spec", [(), (None, "a", "b"), (None, "b", "a"), (None, "b"), (None, None, "b"), ("a", "b")]
)
@pytest.mark.parametrize("kind", ["same", "transposed"])
def test_stacked(stored, monkeypatch, kind, spec, dtype, block):
  monkeypatch.setattr(shards, "_BLOCK", block)
  values, found = stored
  expected = np.stack([value.T if kind == "transposed" else value for value in values])
  param = _place(names.Name("p", "w.{}", kind), found, expected.shape, dtype, spec)
  np.testing.assert_array_equal(np.asarray(param), expected.astype(dtype))


@pytest.mark.parametrize("kind", ["vocabulary", "vocabulary_transposed"])
@pytest.mark.parametrize("spec", [(), ("a", "b"), ("b", "a")])
def test_new_tokens_are_the_mean(stored, kind, spec):
  (value, *_), (tensor, *_) = stored
  mean = value.mean(axis=0, dtype=np.float64).astype(value.dtype)
  expected = np.concatenate([value, np.broadcast_to(mean, (8, IN))])
  expected = expected.T if kind == "vocabulary_transposed" else expected
  name = names.Name("p", "w", kind)
  param = _place(name, [tensor], expected.shape, "bfloat16", spec, OUT + 8)
  np.testing.assert_array_equal(np.asarray(param), expected)


def test_every_process_reads_its_share(stored):
  """...of tensors that are split, however they lie; all of those that are not."""
  _, found = stored
  run = Processes(["-m", "tests.weights.shard_bytes", f"--file={found[0].file}"])
  codes = run.end()
  assert codes == [0, 0], run.text(0) + run.text(1)
  for index in range(2):
    read = json.loads(next(x for x in run.text(index).splitlines() if x.startswith("{")))
    whole = LAYERS * OUT * IN * 2
    assert read == {"rows": whole // 2, "columns": whole // 2, "layers": whole // 2, "all": whole}
