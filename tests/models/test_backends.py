"""Which attention kernel is chosen on which devices, and what is logged about it."""

import logging

import pytest

from vlalign_jax.errors import InputError
from vlalign_jax.models import backends
from vlalign_jax.models.backends import Request

ROWS = Request("gpu", "bfloat16", 128, segments=True, branches=False)
PICTURES = ROWS._replace(segments=False, head_dim=64)
BRANCHES = ROWS._replace(branches=True)


@pytest.mark.parametrize(
  ("request_", "chosen"),
  [
    (ROWS, "cudnn"),
    (PICTURES, "cudnn"),
    (PICTURES._replace(head_dim=72), "cudnn"),  # of SigLIP
    (BRANCHES, "cudnn"),
    (ROWS._replace(dtype="float32"), "tiles"),
    (ROWS._replace(head_dim=100), "tiles"),
    (ROWS._replace(head_dim=136), "tiles"),
    (ROWS._replace(platform="tpu"), "splash"),
    (BRANCHES._replace(platform="tpu"), "splash"),
    (PICTURES._replace(platform="tpu"), "splash"),
    (PICTURES._replace(platform="tpu", head_dim=72), "splash"),
    (ROWS._replace(platform="cpu"), "tiles"),
  ],
)
def test_auto_chooses_the_fastest_supported_kernel(request_, chosen):
  assert backends.choose("auto", request_) == chosen


def test_the_log_says_why_no_faster_one(caplog):
  backends._choose_first.cache_clear()
  with caplog.at_level(logging.INFO):
    for _ in range(2):  # once for each request
      backends.choose("auto", BRANCHES._replace(head_dim=136))
  assert [record.getMessage() for record in caplog.records] == [
    "attention of rows with several answers to a prompt: tiles (cudnn needs heads of a multiple of "
    "8 up to 128, not 136; splash needs a TPU)"
  ]


def test_a_named_kernel_is_used_where_it_is_supported():
  assert backends.choose("splash", PICTURES._replace(platform="tpu")) == "splash"
  assert backends.choose("cudnn", ROWS._replace(head_dim=136)) == "tiles"
  assert backends.choose("tiles", ROWS) == "tiles"


@pytest.mark.parametrize(
  ("name", "request_", "message"),
  [
    ("cudnn", ROWS._replace(platform="cpu"), "cudnn needs an NVIDIA GPU"),
    ("cudnn", ROWS._replace(dtype="float32"), "computes in bfloat16 or float16, not float32"),
    ("splash", ROWS, "splash needs a TPU"),
  ],
)
def test_a_kernel_that_the_devices_cannot_run_is_refused(name, request_, message):
  with pytest.raises(InputError, match=message):
    backends.choose(name, request_)
