"""Tensors are read into shards: the right values, and each byte by who needs it alone."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.process_group import Processes

LAYERS, OUT, IN = 4, 24, 16


def test_every_process_reads_its_share(tmp_path):
  """...of tensors that are split, however they lie; all of those that are not."""
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
    told = json.loads(next(x for x in run.text(index).splitlines() if x.startswith("{")))
    whole = LAYERS * OUT * IN * 2
    half = whole // 2
    assert told["read"] == {"rows": half, "columns": half, "layers": half, "all": whole}
    assert told["cases"] == 160
    assert not told["wrong"]
