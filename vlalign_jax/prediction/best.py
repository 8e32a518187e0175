"""Best of n: the scores of generated answers by a reward model."""

import os

from absl import logging
from jax.sharding import Mesh

from vlalign_jax import out_of_memory, progress
from vlalign_jax.config_checks import Config
from vlalign_jax.data.records import Record
from vlalign_jax.prediction import directory, models, scored
from vlalign_jax.weights.source import ModelSource


def reward_config(config: Config) -> Config:
  """Returns the config by which the reward model reads prompts and answers.

  It reads text, so its tokenizer may be another one. It uses the template that it was trained with,
  sees the images even if the policy does not, and has room for all generated tokens. An answer that
  was cut is scored as if it had ended there.
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
  """Scores the answers that have no score yet, and writes each score at once.

  Args:
    config: of the prediction.
    workdir: its directory.
    lines: of mode `generate`.
    source: the reward model.
    load: see scored.Load.
    records: the records of the lines.
    mesh: the mesh that rows are split over.

  Returns:
    The lines with "reward", and with "best" if a record has several answers: true for the one with
    the highest score, the first of equal ones.
  """
  path = os.path.join(workdir, directory.REWARDS)
  answers: dict[int, list[dict]] = {}
  for line in lines:
    if line["answer"] is not None:
      answers.setdefault(line["record"], []).append(line)
  numbers = sorted(answers)
  scores = {(line["record"], line["sample"]): line["reward"] for line in directory.read_lines(path)}
  scores |= {(x["record"], x["sample"]): x["reward"] for x in lines if "reward" in x}
  if answers:
    directory.write_lines(path, [_score_line(*key, reward) for key, reward in scores.items()])
    answered = [
      scored.with_answers(records[number], [line["answer"] for line in answers[number]])
      for number in numbers
    ]
    indices = {number: index for index, number in enumerate(numbers)}
    done = {(indices[number], sample) for number, sample in scores}
    results = scored.score(reward_config(config), source, load, answered, mesh, done)
    total = sum(map(len, answers.values()))
    with directory.append_lines(path) as append:
      for index, sample, values in progress.shown(results, "reward", total, len(done)):
        scores[numbers[index], sample] = values["reward"]
        append(_score_line(numbers[index], sample, values["reward"]))
        if "reason" in values:
          logging.warning("%s: no score, %s", answered[index].where, values["reason"])
  for group in answers.values():
    for line in group:
      line["reward"] = scores[line["record"], line["sample"]]
    _mark_best(group)
  directory.write_lines(os.path.join(workdir, directory.PREDICTIONS), lines)
  if os.path.exists(path):
    os.remove(path)
  return lines


def _score_line(number: int, sample: int, reward: float | None) -> dict:
  return {"record": number, "sample": sample, "reward": reward}


def _mark_best(lines: list[dict]) -> None:
  if len(lines) < 2:
    return
  scores = [float("-inf") if line["reward"] is None else line["reward"] for line in lines]
  best = scores.index(max(scores))
  for number, line in enumerate(lines):
    line["best"] = number == best and line["reward"] is not None
