"""benchmarks/accelerator.py: lines that lose no others, and its reading of traces."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "benchmarks", "accelerator.py")


def run(directory, *arguments, **environment):
  output = directory / "out.json"
  done = subprocess.run(
    [sys.executable, SCRIPT, "--tiny", f"--output={output}", *arguments],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )
  return done, json.loads(output.read_text()) if output.exists() else None


def test_a_line_that_crashes_loses_no_other(tmp_path):
  done, results = run(tmp_path, "--only=device,product", JAX_PLATFORMS="nonesuch")
  assert done.returncode == 0, done.stderr
  assert [(r["line"], r["what"]) for r in results] == [("device", "failed"), ("product", "failed")]
  assert all("nonesuch" in r["error"] for r in results)


def test_results_are_written_and_late_lines_named(tmp_path):
  done, results = run(tmp_path, "--only=device", JAX_PLATFORMS="cpu")
  assert done.returncode == 0, done.stderr
  assert [(r["line"], r["what"]) for r in results] == [("device", "cpu"), ("device", "done")]
  _, results = run(tmp_path, "--only=device", "--budget=5", JAX_PLATFORMS="cpu")
  assert [r["what"] for r in results] == ["skipped"]


def test_unknown_lines_are_refused(tmp_path):
  done, results = run(tmp_path, "--only=sfft")
  assert done.returncode == 2
  assert results is None
  assert "sfft" in done.stderr


@pytest.fixture
def beside_the_script(monkeypatch):
  monkeypatch.syspath_prepend(os.path.dirname(SCRIPT))


def test_the_model_has_published_sizes(beside_the_script):
  from accelerator_lines import models

  from configs import sft
  from vlalign_jax.weights import published

  assert published.published(sft.get_config("llava15_7b").model) == models.SEVEN_B


def test_rows_are_those_of_training(beside_the_script):
  from accelerator_lines import models

  from vlalign_jax.data import rows as layouts
  from vlalign_jax.data.encode import Example
  from vlalign_jax.sharding import mesh as meshes

  mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  B, image = 2 * mesh.size, models.TINY.tokens_per_image
  packed = models.packed_rows(models.TINY, mesh, B, 64, 2)
  shared, separate = models.pair_rows(models.TINY, mesh, B, 5, 7)
  for arrays, parts, learned in ((packed, 2, 64 - 2 * image), (shared, 1, 14), (separate, 1, 7)):
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    for row in range(2):
      examples = []
      for number in range(parts):
        part = arrays["segments"][row] == number + 1
        names = ("tokens", "positions", "branches", "targets", "loss_mask")
        fields = {name: arrays[name][row][part] for name in names}
        ends = np.flatnonzero(np.diff(np.append(fields["branches"], 99)) > 0)[1:]
        examples.append(Example(**fields, images=(str(number),), where="", answers=ends))
      length = arrays["tokens"].shape[1]
      expected, _ = layouts.build_row(examples, length, parts, models.TINY.image_token_id, image)
      if "answers" in arrays:
        expected |= layouts.answer_places(examples, [row], 1, 2)
      for name, x in expected.items():
        np.testing.assert_array_equal(arrays[name][row], x, err_msg=name)
      assert arrays["loss_mask"][row].sum() == learned


def test_kernels_of_a_trace_are_summed_once(tmp_path, beside_the_script):
  from accelerator_lines import traces

  def kernel(name, micros, thread, process=1):
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "dur": micros, "ts": 0}

  events = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Ops"}},
    {"ph": "M", "pid": 2, "tid": 7, "name": "thread_name", "args": {"name": "Stream of the host"}},
    kernel("fusion_1", 2000, 7),
    kernel("fusion_2", 4000, 7),
    kernel("gemm", 1000, 7),
    kernel("gemm", 5000, 8),  # the same kernel, as an operation
    kernel("python", 9000, 7, process=2),
  ]
  with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
    json.dump({"traceEvents": events}, file)
  found = {r["what"]: r for r in traces.longest(str(tmp_path), steps=2)}
  assert set(found) == {"all kernels", "fusion", "gemm"}
  assert found["all kernels"]["ms"] == 3.5
  assert (found["fusion"]["ms"], found["fusion"]["calls"]) == (3, 1)
  assert found["gemm"]["ms"] == 0.5
