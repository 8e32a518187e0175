"""Best of n: what a reward model thinks of generated answers."""

import os

from absl import logging
from jax.sharding import Mesh

from vlalign_jax import out_of_memory, progress
from vlalign_jax.config_checks import Config
from vlalign_jax.data.records import Record
from vlalign_jax.prediction import directory, models, scored
from vlalign_jax.weights.source import ModelSource


def reward_config(config: Config) -> Config:
  """The config by which the reward model reads prompts and answers.

  It goes by text, so its tokenizer may be another one; it reads in the template that it was trained
  in, sees the pictures even if the policy does not, and has room for all that was generated. An
  answer that was cut is read as if it had ended there.
  """
  c = config.copy_and_resolve_references()
  c.data.template = models.trained_template(c.reward_model) or c.data.template
  c.data.max_length = 2 * (c.data.max_length + c.generation.max_new_tokens)
  c.data.max_images = None
  c.data.blank_images = False
  return c


@out_of_memory.names(out_of_memory.SCORING)
def add_rewards(
  config: Config,
  workdir: str,
  lines: list[dict],
  source: ModelSource,
  load: scored.Load,
  records: tuple[Record, ...],
  mesh: Mesh,
) -> list[dict]:
  """Scores answers that have no score yet, writing each score as it comes.

  Args:
    config: of the prediction.
    workdir: its directory.
    lines: of mode `generate`.
    source: the reward model.
    load: see scored.Load.
    records: those that the lines are about.
    mesh: over which rows are split.

  Returns:
    The lines with "reward", and with "best" where a record has several answers: true for the one
    that scores the highest, of equal ones the first.
  """
  path = os.path.join(workdir, directory.REWARDS)
  answers: dict[int, list[dict]] = {}
  for line in lines:
    if line["answer"] is not None:
      answers.setdefault(line["record"], []).append(line)
  numbers = sorted(answers)
  known = {(line["record"], line["sample"]): line["reward"] for line in directory.read_lines(path)}
  known |= {(x["record"], x["sample"]): x["reward"] for x in lines if "reward" in x}
  if answers:
    directory.write_lines(path, [_score(*key, reward) for key, reward in known.items()])
    asked = [
      scored.with_answers(records[number], [line["answer"] for line in answers[number]])
      for number in numbers
    ]
    place = {number: at for at, number in enumerate(numbers)}
    done = {(place[number], sample) for number, sample in known}
    found = scored.evaluate(reward_config(config), source, load, asked, mesh, done)
    total = sum(map(len, answers.values()))
    with directory.appended(path) as add:
      for at, sample, values in progress.shown(found, "reward", total, len(done)):
        known[numbers[at], sample] = values["reward"]
        add(_score(numbers[at], sample, values["reward"]))
        if "reason" in values:
          logging.warning("%s: no score, %s", records[numbers[at]].where, values["reason"])
  for line in lines:
    if line["answer"] is not None:
      line["reward"] = known[line["record"], line["sample"]]
  for of_record in answers.values():
    _mark_best(of_record)
  directory.write_lines(os.path.join(workdir, directory.PREDICTIONS), lines)
  if os.path.exists(path):
    os.remove(path)
  return lines


def _score(number: int, sample: int, reward: float | None) -> dict:
  return {"record": number, "sample": sample, "reward": reward}


def _mark_best(lines: list[dict]) -> None:
  if len(lines) < 2:
    return
  scores = [float("-inf") if line["reward"] is None else line["reward"] for line in lines]
  best = scores.index(max(scores))
  for number, line in enumerate(lines):
    line["best"] = number == best and line["reward"] is not None
