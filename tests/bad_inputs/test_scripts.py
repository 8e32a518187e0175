"""The whole way: scripts end with one line and exit code 1."""

import pathlib
import re
import subprocess
import sys

import pytest

from scripts import check_data
from tests import sft_run
from vlalign_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments):
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
  )


def test_scripts_end_with_one_line_and_code_1(tmp_path, model, records):
  """The whole way once: the message is all that a script prints."""
  train = sft_run.write_json(tmp_path / "data" / "train.json", records)
  good = sft_run.make_config(model, train)
  (tmp_path / "data" / "000.png").write_bytes(b"")
  done = _run("scripts/train_sft.py", "--config=configs/sft.py:demo", "--config.data.trian=x")
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: unknown key config.data.trian; did you mean config.data.train?\n"

  done = _run(*sft_run.command_line(good, ""))
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: --workdir is missing: the directory that this run is written to\n"

  script, config, _, *overrides = sft_run.command_line(good, "", "scripts/check_data.py")
  done = _run(script, config, *overrides)
  assert done.returncode == 1
  assert 'train.json, record 0 ("id": "r0"): image "000.png"' in done.stdout
  assert "Traceback" not in done.stdout + done.stderr


def test_outputs_of_check_data_are_checked_first(tmp_path):
  """Before the config is read: nothing is computed for a page that cannot be written."""
  config = sft_run.make_config("nowhere", "nowhere.json")
  missing = tmp_path / "missing"
  for keys, line in (
    ({"page": f"{missing}/x.html"}, f"--page {missing}/x.html: no such directory; make it"),
    ({"page": "s3://bucket/x.html"}, "--page s3://bucket/x.html: only gs:// is supported"),
    ({"write_good": f"{missing}/x.json"}, f"--write_good {missing}/x.json: cannot be written"),
    ({"write_good": __file__}, f"--write_good {__file__} exists; remove it"),
  ):
    with pytest.raises(InputError, match=re.escape(line)):
      check_data.check_data(config, **keys)
