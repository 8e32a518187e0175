"""How fast a run is: tokens a second, the share of the chips' peak, time lost, compilations."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging

from vlalign_jax.models.vlm import ModelConfig
from vlalign_jax.sharding import chips
from vlalign_jax.steps import model_flops


class Speed:
  """Measures from the last call of `rates` or `restart` on.

  Args:
    flops: `(T,) -> operations that the model needs for a token of a row of T tokens`; None: MFU is
      not counted.
    peak: operations a second of all devices; None: MFU is not counted.
  """

  def __init__(self, flops: Callable[[int], float] | None = None, peak: float | None = None):
    self._flops, self._peak = flops, peak
    self._shapes: set[tuple[int, ...]] = set()
    self.restart()

  def restart(self) -> None:
    """Starts counting anew."""
    self._start = time.perf_counter()
    self._tokens = self._examples = 0
    self._waited = self._operations = 0.0

  def add(self, tokens: int, examples: int, length: int) -> None:
    """Counts the work of a step.

    Args:
      tokens: without padding.
      examples: of the step.
      length: T, tokens of a row.
    """
    self._tokens += tokens
    self._examples += examples
    if self._flops is not None:
      self._operations += tokens * self._flops(length)

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time of its block as time in which no data was there."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def step(self, number: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Logs how long the first step with batches of a shape took, most of it to compile or load.

    Args:
      number: of the step.
      shape: of the batch's tokens.
    """
    start = time.perf_counter()
    yield
    if shape not in self._shapes:
      self._shapes.add(shape)
      rows = " x ".join(map(str, shape))
      logging.info(
        "step %d is the first with %s tokens: %.1f s, compilation included; shape number %d",
        *(number, rows, time.perf_counter() - start, len(self._shapes)),
      )

  def rates(self) -> dict[str, float]:
    """Returns rates since the last call, and starts anew.

    Returns:
      perf/tokens_per_second (without padding) and perf/examples_per_second; perf/data_wait, the
      share of the time in which the step waited for data; perf/compilations, the number of shapes
      of batches so far; perf/mfu, the model's operations over what the chips can do, where known.
    """
    seconds = max(time.perf_counter() - self._start, 1e-9)
    rates: dict[str, float] = {
      "perf/tokens_per_second": round(self._tokens / seconds, 1),
      "perf/examples_per_second": round(self._examples / seconds, 3),
      "perf/data_wait": round(self._waited / seconds, 4),
      "perf/compilations": len(self._shapes),
    }
    if self._flops is not None and self._peak:
      rates["perf/mfu"] = round(self._operations / seconds / self._peak, 4)
    self.restart()
    return rates


def measure(mesh: jax.sharding.Mesh, model: ModelConfig, params, trained, images: int) -> Speed:
  """Returns the Speed of a run; logs which peak MFU is a share of, or that none is known.

  Args:
    mesh: over all devices.
    model: the architecture.
    params, trained: shapes of all parameters, and of those that are trained.
    images: of a row.
  """

  def flops(length: int) -> float:
    return model_flops.count(params, trained, model, 1, length, images) / length

  kind = mesh.devices.flat[0].device_kind
  chip = chips.of_device(kind)
  if chip is None or chip.flops is None:
    logging.info("perf/mfu is not logged: the peak of %s is not known", kind)
    return Speed()
  logging.info("perf/mfu: of %.0f TFLOP/s (bfloat16) of %s", chip.flops / 1e12, chip.name)
  return Speed(flops, chip.flops * mesh.size)
