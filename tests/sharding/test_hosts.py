"""Two processes of four devices each: they compute the numbers of one, and end together."""

import http.server
import json
import os
import signal
import socket
import threading

import jax
import numpy as np
import pytest

from tests import sft_run, tiny_models
from tests.process_group import Processes, free_port
from vlalign_jax.errors import InputError
from vlalign_jax.sharding import processes

STEPS = 12
TIMING = "perf/"


def test_rows_counts_and_errors_on_two_hosts():
  run = Processes(["-m", "tests.sharding.host_steps"])
  codes = run.end()
  assert codes == [1, 1], run.text(0) + run.text(1)
  first, second = run.text(0), run.text(1)
  results = json.loads(next(line for line in first.splitlines() if line.startswith("{")))
  blocks = {
    "rows": [0, 1, 2, 3],
    "alternating": [0, 2, 4, 6],
    "tensor within a host": [0],
    "tensor over both hosts": [0, 1, 2, 3],
    "tensor over all": [0],
  }
  for name, parts in blocks.items():
    assert results[name] == {"blocks": parts, "same": True, "counts": True, "agreed": True}, name
  assert results["decided"] == [3.0, 4]
  assert results["differ"] == "process 1 and process 0 differ in the seed; give both the same"
  assert "error: the disk of this host is full\n" in second
  assert "error: ended, as process 1 ended: the disk of this host is full\n" in first
  assert "Traceback" not in first + second


def test_processes_that_do_not_start_are_an_error():
  run = Processes(["-m", "tests.sharding.host_steps"], alone=True, start_timeout=1)
  assert run.end() == [1]
  expected = "not all processes came within 1 s; give every host the same command"
  assert expected in run.text(0)


def test_a_port_in_use_is_refused():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=f"process 0 cannot listen on port {port}"):
      processes.start(f"127.0.0.1:{port}", 2, 0)


def test_a_coordinator_that_does_not_answer_is_an_error():
  port = free_port()
  with pytest.raises(InputError) as caught:
    processes.start(f"127.0.0.1:{port}", 2, 1, start_timeout=1)
  for part in (
    f"--coordinator=127.0.0.1:{port} does not answer after 1 s",
    "start process 0 there",
  ):
    assert part in str(caught.value)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (("10.0.0.1:8476", None, None), "--processes, --process missing"),
    ((None, 2, 0), "--coordinator missing: --coordinator, --processes and --process go together"),
    (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1: give HOST:PORT"),
    (("10.0.0.1:http", 2, 0), "give HOST:PORT"),
    (("10.0.0.1:8476", 2, 2), "--process=2 is not one of --processes=2; they count from 0 to 1"),
    (("10.0.0.1:8476", 2, -1), "--process=-1 is not one of"),
    (("10.0.0.1:8476", 0, 0), "--process=0 is not one of --processes=0"),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, expected):
  with pytest.raises(InputError, match=expected.replace(".", r"\.")):
    processes.start(*flags)


# --- Clusters recognized without flags ---


class _Metadata(http.server.BaseHTTPRequestHandler):
  """Answers like the metadata server of a TPU VM."""

  def do_GET(self):
    assert self.headers["Metadata-Flavor"] == "Google"
    key = self.path.rpartition("/")[2]
    self.send_response(200 if key in self.server.values else 404)
    self.end_headers()
    self.wfile.write(self.server.values.get(key, "").encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def joined(monkeypatch):
  """Records the arguments of jax.distributed.initialize."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
  for name in list(os.environ):
    if name.startswith(("SLURM_", "TPU_", "MEGASCALE_")):
      monkeypatch.delenv(name)
  return calls


def test_one_process_joins_nothing(joined):
  processes.start(None, None, None)
  processes.start("10.0.0.1:8476", 1, 0)
  assert not joined


@pytest.mark.parametrize(
  ("nodes", "gpus", "devices"), [("4", "8", list(range(8))), ("2", "2", None), ("4", None, None)]
)
def test_slurm(joined, monkeypatch, nodes, gpus, devices):
  """One task per node gets all GPUs of the node; with several, JAX assigns one GPU to each."""
  step = {"JOB_ID": "7", "STEP_NODELIST": "n[1-4]", "PROCID": "1", "LOCALID": "0", "NTASKS": "4"}
  for name, value in (step | {"STEP_NUM_NODES": nodes, "GPUS_ON_NODE": gpus}).items():
    if value:
      monkeypatch.setenv(f"SLURM_{name}", value)
  processes.start(None, None, None, heartbeat_timeout=9)
  assert [call["local_device_ids"] for call in joined] == [devices]
  assert joined[0]["heartbeat_timeout_seconds"] == 9
  assert "coordinator_address" not in joined[0]
  monkeypatch.setenv("SLURM_NTASKS", "1")
  processes.start(None, None, None)
  assert len(joined) == 1


@pytest.mark.parametrize(
  ("values", "several"),
  [
    ({"worker-network-endpoints": "unknown:unknown:10.0.0.1"}, False),
    ({"worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2"}, True),
    ({"worker-network-endpoints": "host-0", "tpu-env": "X: '1'\nMEGASCALE_NUM_SLICES: '2'"}, True),
    ({}, False),
  ],
)
def test_tpu_vm(joined, monkeypatch, values, several):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
  server.values = values
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", "tpu,cpu")  # as JAX sets it where there are TPUs
  try:
    processes.start(None, None, None)
    assert len(joined) == several
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    processes.start(None, None, None)
    assert len(joined) == several + 1
  finally:
    jax.config.update("jax_platforms", before)
    server.shutdown()
    server.server_close()


# --- Training ---


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("sft")
  one_layer = {"num_hidden_layers": 1}
  tiny_models.make_llava(str(directory / "model"), text=one_layer)
  records = sft_run.make_records(str(directory / "data"), 28)
  train = sft_run.write_json(directory / "data" / "train.json", records[:24])
  evaluation = sft_run.write_json(directory / "data" / "eval.json", records[24:])
  return sft_run.make_config(
    directory / "model",
    train,
    **{
      "data.eval": evaluation,
      "max_steps": STEPS,
      "batch_size": 8,
      "save_every": 2,
      "eval_every": 4,
      "mesh.fsdp": 4,
      "mesh.zero_stage": 3,
    },
  )


def _saved(workdir) -> list[int]:
  places = (workdir / "checkpoints").iterdir()
  return sorted(int(place.name) for place in places if place.name.isdigit())


def _metrics(workdir, steps) -> dict[str, np.ndarray]:
  """Returns the first lines of metrics.jsonl by name, without what time decides."""
  lines = sft_run.read_metrics(workdir)[:steps]
  assert [line["step"] for line in lines] == list(range(1, steps + 1))
  names = sorted({name for line in lines for name in line if not name.startswith(TIMING)})
  return {name: np.array([line[name] for line in lines if name in line]) for name in names}


@pytest.mark.slow
def test_run_of_two_processes(config, compile_cache, tmp_path):
  """It has the metrics of one process, after either was killed, and stops if one gets SIGTERM."""
  one = tmp_path / "one"
  single = Processes(sft_run.command_line(config, str(one)), compile_cache, count=1)
  assert single.end() == [0], single.text(0)
  workdir = tmp_path / "two"
  log = workdir / "metrics.jsonl"

  def start():
    command = sft_run.command_line(config, str(workdir))
    return Processes(command, compile_cache, heartbeat_timeout=10)

  def reach(run, step):
    run.wait_for(lambda: log.exists() and f'{{"step": {step}, ' in log.read_text())

  for killed, step in ((1, 3), (0, 5)):
    run = start()
    reach(run, step)
    run.all[killed].kill()
    # Without the coordinator the other one ends at once, otherwise when heartbeats are missing.
    assert run.end(timeout=30)[1 - killed] not in (0, None)
    assert not (workdir / "checkpoints" / str(STEPS)).exists()

  run = start()
  reach(run, 7)
  run.all[1].send_signal(signal.SIGTERM)
  assert run.end() == [0, 0], run.text(0) + run.text(1)
  stopped = _saved(workdir)[-1]
  assert 7 <= stopped < STEPS, run.text(0)
  assert "going on from step" in run.text(0)
  assert f"SIGTERM: saved at step {stopped}" in run.text(0)
  assert "SIGTERM" not in run.text(1)  # only process 0 logs it

  metrics, expected = _metrics(workdir, stopped), _metrics(one, stopped)
  assert metrics.keys() == expected.keys() >= {"loss", "grad_norm", "eval/loss"}
  for name, values in expected.items():
    np.testing.assert_allclose(metrics[name], values, rtol=1e-5, err_msg=name)
  for name in ("learned_tokens", "bad_records", "eval/examples"):
    np.testing.assert_array_equal(metrics[name], expected[name], err_msg=name)
