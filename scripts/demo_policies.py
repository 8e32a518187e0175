"""Lets the policies of the demo answer held-out questions, and measures how far they have gone.

  python scripts/demo_policies.py --demo=DIRECTORY

For each policy, answers_NAME is what scripts/predict.py writes with the demo's reward model. For
each that began as another one, divergence_NAME/divergence.json has {"kl": nats per answer}: of
answers sampled from the policy, one to a question, the mean of log(policy / start), both as
scripts/predict.py gives them of these answers. The same command resumes.
"""

import json
import os

import demo_result
from absl import flags
from ml_collections import ConfigDict

from vlalign_jax import cli, storage
from vlalign_jax.prediction import settings
from vlalign_jax.prediction.predict import predict

_DEMO = flags.DEFINE_string("demo", None, "What scripts/demo.sh has written.", required=True)


def main(_):
  questions = path("data/preferences_eval.json")
  runs = {name: demo_result.checkpoint(_DEMO.value, name) for name in demo_result.POLICIES}
  for name, run in runs.items():
    config = make_config(run, questions, settings.GENERATE)
    config.reward_model = path("reward")
    predict(config, path(f"answers_{name}"))
  for name, start in demo_result.POLICIES.items():
    if start:
      found = divergence(runs[name], runs[start], questions, path(f"divergence_{name}"))
      storage.write(path(f"divergence_{name}/divergence.json"), json.dumps({"kl": found}) + "\n")


def path(name: str) -> str:
  """Returns the path of something in the demo's directory."""
  return os.path.join(_DEMO.value, name)


def divergence(policy: str, start: str, questions: str, output: str) -> float:
  """Computes how far a policy is from its start, in nats per answer that it samples."""
  answered = os.path.join(output, "sampled.json")
  config = make_config(policy, questions, settings.GENERATE, gallery=0)
  config.generation.temperature = 1.0
  sampled, _ = predict(config, os.path.join(output, "sampled"))
  write_answers(answered, questions, sampled)
  logprobs = []
  for name, run in (("policy", policy), ("start", start)):
    config = make_config(run, answered, settings.LOG_PROBABILITIES, gallery=0)
    lines, _ = predict(config, os.path.join(output, f"by_{name}"))
    logprobs.append([line["logprob"] for line in lines])
  return sum(mine - before for mine, before in zip(*logprobs, strict=True)) / len(logprobs[0])


def make_config(run: str, records: str, mode: str, gallery: int = 100) -> ConfigDict:
  """Returns the config of a prediction from a run of the demo, or one of its checkpoints."""
  c = settings.defaults()
  c.mode, c.model.init_from, c.model.dtype = mode, run, "float32"
  c.generation.max_new_tokens = 16
  c.data.eval, c.data.images = records, path("data/images")
  c.batch_size, c.gallery = 100, gallery
  return c


def write_answers(output: str, questions: str, lines: list[dict]) -> None:
  """Writes the questions with these answers in place of ranked ones, but for empty answers."""
  with open(questions, encoding="utf-8") as file:
    records = json.load(file)
  answered = []
  for line in lines:
    record = records[line["record"]]
    if line["answer"]:
      turns = [*record["conversations"][:-1], {"from": "gpt", "value": line["answer"]}]
      answered.append(record | {"conversations": turns})
  storage.write(output, json.dumps(answered))


if __name__ == "__main__":
  cli.run(main)
