"""Tests that shards get the right values, and that a process reads only the bytes it needs."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.process_group import Processes

LAYERS, OUT, IN = 4, 24, 16


def test_every_process_reads_its_share(tmp_path):
  """It reads half of a tensor that is split in any way, and all of one that is not split."""
  rng = np.random.default_rng(0)
  file = str(tmp_path / "model.safetensors")
  shape = (OUT, IN)
  save_file(
    {f"w.{i}": rng.normal(size=shape).astype(ml_dtypes.bfloat16) for i in range(LAYERS)}, file
  )
  run = Processes(["-m", "tests.weights.shard_bytes", f"--file={file}"])
  codes = run.end()
  assert codes == [0, 0], run.text(0) + run.text(1)
  for index in range(2):
    result = json.loads(next(x for x in run.text(index).splitlines() if x.startswith("{")))
    size = LAYERS * OUT * IN * 2
    half = size // 2
    assert result["read"] == {"rows": half, "columns": half, "layers": half, "all": size}
    assert result["cases"] == 160
    assert not result["wrong"]
