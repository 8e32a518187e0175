"""The loop of all stages: next batch, step, log, evaluate, save; stops and resumes exactly."""

import collections
import dataclasses
import signal
import threading
from collections.abc import Callable, Sequence

import jax
import orbax.checkpoint as ocp
from absl import logging

from vlalign_jax import out_of_memory
from vlalign_jax.data import bad_records
from vlalign_jax.errors import InputError
from vlalign_jax.optim.state import TrainState
from vlalign_jax.runs import checkpoints
from vlalign_jax.training import look
from vlalign_jax.training.metrics import MetricLog
from vlalign_jax.training.speed import Speed
from vlalign_jax.training.trace import Trace
from vlalign_jax.writers.writer import Writer

# Metrics are read this many steps late, so that the devices never wait for the host.
LAG = 2
MAX_SKIPPED_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class LoopFunctions:
  """What the loop calls.

  Attributes:
    train_step: `(state, batch, carried) -> (state, metrics, carried)`, with `carried` a dict that
      goes through JSON into checkpoints: what the stage takes along from step to step on the host.
    to_device: host batch (dict of arrays of this process's rows) -> batch on the devices.
    count: `(batch, skipped, stop) -> counts` over all hosts, see `hosts.make_counter`.
    evaluate: `(state) -> dict of floats`, or None.
    records: number of training records.
    evaluates_first: whether to evaluate the state of step 0, too.
    lag: how many steps late metrics are read; 0 where a step waits for the devices anyway.
    speed: measures the run; None: without MFU.
  """

  train_step: Callable
  to_device: Callable
  count: Callable
  evaluate: Callable | None
  records: int
  evaluates_first: bool = False
  lag: int = LAG
  speed: Speed | None = None


class Stop:
  """Whether SIGTERM (preemption) asked this host to stop; all hosts then save and end in order."""

  def __init__(self):
    self.asked = False
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self.asked = True


@out_of_memory.names(out_of_memory.TRAINING)
def run(
  config,
  workdir: str,
  functions: LoopFunctions,
  state: TrainState,
  progress: dict,
  batches,
  manager: ocp.CheckpointManager,
  total_steps: int,
  writers: Sequence[Writer] = (),
  profile: int = 0,
) -> TrainState | None:
  """Trains from the state's step to `total_steps`.

  Args:
    config: its log_every, eval_every, save_every, save_best_limit; all of it goes into checkpoints.
    workdir: the run directory.
    functions: what the loop calls.
    state: where to begin.
    progress: of the checkpoint that `state` is from. At the start it has {"bad_records": 0}, and
      what every checkpoint of the run is to hold.
    batches: iterator with `get_state` and `set_state`, at the state's step.
    manager: of the checkpoints.
    total_steps: where to end.
    writers: are given what metrics.jsonl is given.
    profile: number of steps to trace.

  Returns:
    The final state, or None if SIGTERM ended the run early (it is saved then).

  Raises:
    InputError: ten updates in a row were not finite, or too many records are unreadable.
  """
  if "data" in progress:
    batches.set_state(progress["data"])  # checks that the examples so far are the same
  stop, first = Stop(), int(state.step)
  alone, others_stop = jax.process_count() == 1, False
  log = MetricLog(workdir, first, total_steps, functions.lag, writers)
  speed, trace = functions.speed or Speed(), Trace(workdir, first, profile)
  pending, bad_count = collections.deque(), progress["bad_records"]
  carried = progress.get("carried", {})
  measured = {}  # step -> metrics of the evaluation there, of the newest one

  def evaluated(step: int) -> bool:
    due = config.eval_every and step % config.eval_every == 0
    return functions.evaluate is not None and bool(due or step == total_steps)

  def settle(keep: int) -> None:
    """Reads the metrics of all but the newest `keep` steps."""
    nonlocal bad_count, others_stop
    while len(pending) > keep:
      step, metrics, counts, length = pending.popleft()
      metrics, counts = jax.device_get((metrics, counts))
      bad_count += int(counts["bad_records"])
      examples = max(functions.records, step * config.batch_size)
      bad_records.check("data.train", bad_count, examples, config.data)
      others_stop = others_stop or counts["stop"] > 0
      if metrics.pop("skipped_in_a_row") >= MAX_SKIPPED_IN_A_ROW:
        raise InputError(
          f"step {step}: loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} updates in a "
          "row; lower optim.learning_rate, or look at the data of these steps"
        )
      speed.add(int(counts["tokens"]), int(counts["examples"]), length)
      log.advance(step)
      if step % config.log_every == 0 or step in (1, total_steps):
        values = {key: float(value) for key, value in metrics.items()}
        values |= {"bad_records": bad_count} | speed.rates() | log.usage()
        log.write(step, values, more_follow=evaluated(step))

  def stops() -> bool:
    """Returns whether a host was asked to stop: all hosts know at the same step, without waiting.

    A step is counted before its update, so the oldest count here is known as soon as the metrics
    that `settle` has just read.
    """
    if alone:
      return stop.asked
    return others_stop or bool(pending and jax.device_get(pending[0][2]["stop"]) > 0)

  def evaluate(step: int) -> None:
    settle(0)
    try:
      with out_of_memory.explained(out_of_memory.EVALUATION, config):
        values = functions.evaluate(state)
    except InputError:  # an evaluation that fails must not cost what was trained
      save(step)
      raise
    values = {f"eval/{key}": value for key, value in values.items()}
    log.write(step, values)
    measured.clear()
    measured[step] = values
    speed.restart()  # the time of evaluation does not count

  def save(step: int, position: dict | None = None) -> None:
    settle(0)
    log.flush()  # a checkpoint never knows of steps that the log does not
    newest = {
      "step": step,
      "bad_records": bad_count,
      "data": position or batches.get_state(),
      "config": config.to_dict(),
      "metrics": measured.get(step, {}),
      "carried": carried,
    }
    checkpoints.save(manager, step, state, progress | newest)

  def save_before(step: int, position: dict) -> None:
    """Saves the state from before a step that failed, unless the step has already given it up."""
    deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    if alone and saved < step - 1 and not deleted:
      save(step - 1, position)

  saved = first
  try:
    if functions.evaluates_first and functions.evaluate is not None and not first:
      evaluate(0)
    for step in range(first + 1, total_steps + 1):
      position = batches.get_state()
      with speed.waiting():
        host_batch = next(batches)
      batch = functions.to_device(host_batch)
      skipped = batch.pop("skipped")
      counts = functions.count(batch, skipped, stop.asked)
      trace.before(step)
      try:
        with (
          out_of_memory.explained(out_of_memory.TRAINING, config),
          speed.step(step, batch["tokens"].shape),
        ):
          state, metrics, carried = functions.train_step(state, batch, carried)
      except InputError:  # a step that fails must not cost those before it
        save_before(step, position)
        raise
      trace.after(step, state)
      pending.append((step, metrics, counts, batch["tokens"].shape[1]))
      settle(functions.lag)
      if evaluated(step):
        evaluate(step)
      due = config.save_every and step % config.save_every == 0
      # The best checkpoint can only be one that was saved when it was evaluated.
      if (due or (config.save_best_limit and step in measured)) and step < total_steps:
        save(step)
        saved = step
      if stops():
        break
    settle(0)
    last = int(state.step)
    if saved < last:
      save(last)
  finally:
    trace.close()
    log.close()
    manager.wait_until_finished()  # a bad record must not interrupt a save
  if last < total_steps:
    logging.info("SIGTERM: saved at step %d; the same command goes on from there", last)
    return None
  logging.info(look.where_to_look(workdir))
  return state
