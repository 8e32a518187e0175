"""The speed in the log: rates, MFU by the plain formula, compilations; traces of steps."""

import itertools
import time

import jax
import pytest

from scripts import train_sft
from tests import sft_run, tiny_models
from vlalign_jax.sharding import chips
from vlalign_jax.training import speed as speeds


def test_rates(monkeypatch):
  clock = itertools.count()  # a second for each look
  monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
  speed = speeds.Speed(lambda length: 10.0 * length, peak=1e5)
  with speed.waiting():
    pass
  speed.add(tokens=300, examples=6, length=64)
  speed.add(tokens=100, examples=2, length=128)
  rates = speed.rates()
  assert rates == {
    "perf/tokens_per_second": round(400 / 3, 1),
    "perf/examples_per_second": round(8 / 3, 3),
    "perf/data_wait": round(1 / 3, 4),
    "perf/compilations": 0,
    "perf/mfu": round((300 * 640 + 100 * 1280) / 3 / 1e5, 4),
  }
  assert speed.rates()["perf/tokens_per_second"] == 0


def test_an_unknown_chip_has_no_mfu():
  assert chips.of_device("cpu") is None
  assert chips.of_device("NVIDIA H100 80GB HBM3") is chips.GPUS["h100"]
  assert "perf/mfu" not in speeds.Speed().rates()


def test_every_tpu_is_known_by_the_name_that_jax_gives_it():
  from vlalign_jax.planning import topology

  for kind in chips.TPUS:
    slice_ = topology.open_topology(f"{kind}:2x2" + "x1" * (chips.TORUS[kind] - 2))
    assert chips.of_device(slice_.devices[0].device_kind) is chips.TPUS[kind]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_logs_its_speed_and_traces_steps(tmp_path, steps, caplog, compile_cache):
  tiny_models.make_llava(str(tmp_path / "model"))
  records = sft_run.make_records(str(tmp_path), 24)
  path = sft_run.write_json(tmp_path / "train.json", records)
  config = sft_run.make_config(tmp_path / "model", path)
  with caplog.at_level("INFO", logger="absl"):
    train_sft.train_and_evaluate(config, str(tmp_path / "run"), profile=steps)
  lines = sft_run.read_metrics(tmp_path / "run")
  assert all(line["perf/tokens_per_second"] > 0 for line in lines)
  assert all(0 <= line["perf/data_wait"] <= 1 for line in lines)
  shapes = lines[-1]["perf/compilations"]
  assert caplog.text.count("s, compilation included") == shapes >= 1
  assert f"the peak of {jax.devices()[0].device_kind} is not known" in caplog.text
  traces = list((tmp_path / "run").rglob("*.trace.json.gz"))
  assert len(traces) == bool(steps)
  assert ("a trace of 2 steps is in" in caplog.text) == bool(steps)
