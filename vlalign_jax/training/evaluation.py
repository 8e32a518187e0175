"""Evaluation during training: one pass over held-out records, summed on the devices."""

import functools
from collections.abc import Callable

import jax

from vlalign_jax.data import bad_records
from vlalign_jax.input_pipeline.prepare import Prepared
from vlalign_jax.losses import sums as reported
from vlalign_jax.sharding import hosts


def count_bad(config, prepared: Prepared, counts) -> int:
  """Returns the number of bad records from the `counts` of batches.

  Raises:
    InputError: they are too many.
  """
  bad = sum(int(one["bad_records"]) for one in jax.device_get(counts))
  bad_records.check("data.eval", bad, prepared.records, config.data)
  return bad


def read_all(config, mesh: jax.sharding.Mesh, prepared: Prepared, share: dict) -> int:
  """Makes all evaluation batches once; returns how many records cannot be read, on all hosts.

  Args:
    config, mesh, prepared, share: of `make_evaluate`.

  Raises:
    InputError: they are too many.
  """
  count = hosts.make_counter(mesh)
  read = (hosts.to_device(mesh, batch) for batch in prepared.read(**share))
  return count_bad(config, prepared, [count(batch, batch["skipped"]) for batch in read])


def make_evaluate(
  config,
  mesh: jax.sharding.Mesh,
  prepared: Prepared | None,
  share: dict,
  eval_step: Callable,
  summary: Callable,
  to_device: Callable | None = None,
) -> Callable | None:
  """Reads all records once, and returns the function of a state that the loop calls.

  Bad records are found now, as the first evaluation may be days away.

  Args:
    config: of the run.
    mesh: over which batches are split.
    prepared: the evaluation data; None: there is none.
    share: of `start.my_share`.
    eval_step: `(trained parameters, batch) -> values`, see `losses.sums`.
    summary: the values of all batches together -> dict of floats, the metrics.
    to_device: host batch -> batch on the devices; None: `hosts.to_device`.

  Returns:
    `state -> dict of floats`, or None without data.

  Raises:
    InputError: too many records cannot be read.
  """
  if prepared is None:
    return None
  count = hosts.make_counter(mesh)
  to_device = to_device or functools.partial(hosts.to_device, mesh)
  read_all(config, mesh, prepared, share)

  def evaluate(state) -> dict[str, float]:
    counts, sums = [], []
    # Threads: a pool of processes takes longer to start than most evaluations take.
    with prepared.batches(workers=0, **share) as batches:
      for batch in batches:
        batch = to_device(batch)
        counts.append(count(batch, batch.pop("skipped")))
        sums.append(eval_step(state.params, batch))
    bad = count_bad(config, prepared, counts)
    # Fetched once at the end, so that the devices need not wait.
    return summary(reported.total(jax.device_get(sums))) | {"bad_records": bad}

  return evaluate
