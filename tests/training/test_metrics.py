"""Tests what metrics.jsonl says about time and memory, and the line that ends a run."""

import pathlib
import time
import types

import jax
import pytest

from tests import sft_run
from vlalign_jax.training import look
from vlalign_jax.training.metrics import MetricLog

ROOT = pathlib.Path(__file__).parents[2]


def device(peak: int | None):
  """Returns a device whose memory had this peak; None: it does not report any."""
  stats = None if peak is None else {"bytes_in_use": 1, "peak_bytes_in_use": peak}
  return types.SimpleNamespace(memory_stats=lambda: stats)


@pytest.mark.parametrize(
  ("peaks", "expected"), [((2_500_000_000, 7_250_400_000), 7.25), ((None, None), None)]
)
def test_the_memory_is_that_of_the_fullest_device(tmp_path, monkeypatch, peaks, expected):
  log = MetricLog(str(tmp_path), 0, 2)
  monkeypatch.setattr(jax, "local_devices", lambda: [device(peak) for peak in peaks])
  usage = log.usage()
  log.close()
  assert usage.get("perf/peak_memory_gb") == expected
  assert ("perf/peak_memory_gb" in usage) == (expected is not None)


def test_the_time_goes_on_where_the_checkpoint_is(tmp_path, monkeypatch):
  clock = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: clock[0])
  log = MetricLog(str(tmp_path), 0, 4)
  for step in (1, 2, 3):
    clock[0] += 10.0
    log.write(step, {"loss": 1.0} | log.usage())
  log.close()
  clock[0] += 500.0  # nothing runs; step 3 is lost
  log = MetricLog(str(tmp_path), 2, 4)
  clock[0] += 5.0
  log.write(3, {"loss": 1.0} | log.usage())
  log.close()
  assert [line["perf/seconds"] for line in sft_run.read_metrics(tmp_path)] == [10.0, 20.0, 25.0]


def test_other_processes_write_and_measure_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  log = MetricLog(str(tmp_path), 0, 2)
  assert log.usage() == {}
  log.write(1, {"loss": 1.0})
  log.close()
  assert [*tmp_path.iterdir()] == []


def test_where_to_look(tmp_path, monkeypatch):
  for name in ("metrics.jsonl", "rollouts.html", "events.out.tfevents.1"):
    (tmp_path / name).touch()
  monkeypatch.chdir(ROOT)
  found = look.where_to_look(str(tmp_path))
  assert found == (
    f"look at rollouts.html, metrics.jsonl in {tmp_path}; python scripts/report.py {tmp_path}; "
    f"tensorboard --logdir {tmp_path}"
  )
  (tmp_path / "events.out.tfevents.1").unlink()
  monkeypatch.chdir(tmp_path)  # no checkout: the command is installed
  found = look.where_to_look(str(tmp_path))
  assert found.endswith(f"in {tmp_path}; vlalign-report {tmp_path}")
