"""How far a policy of the demo has gone from the one that it began as, on held-out questions.

  python scripts/demo_divergence.py --policy=RUN --start=RUN --data=DIR --output=DIR

writes OUTPUT/divergence.json, {"kl": nats per answer}: of answers sampled from the policy, one to a
question, the mean of log(policy / start), both as scripts/predict.py gives them of these answers.
The predictions are next to it; the same command resumes.
"""

import json
import os

from absl import flags
from ml_collections import ConfigDict

from vlalign_jax import cli, storage
from vlalign_jax.prediction import settings
from vlalign_jax.prediction.predict import predict

_POLICY = flags.DEFINE_string("policy", None, "A run.", required=True)
_START = flags.DEFINE_string("start", None, "The run that it began from.", required=True)
_DATA = flags.DEFINE_string("data", None, "What make_demo.py has written.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write.", required=True)


def main(_):
  questions = os.path.join(_DATA.value, "preferences_eval.json")
  answered = os.path.join(_OUTPUT.value, "sampled.json")
  config = make_config(_POLICY.value, questions, settings.GENERATE)
  sampled, _ = predict(config, os.path.join(_OUTPUT.value, "sampled"))
  write_answers(answered, questions, sampled)
  logprobs = []
  for name, run in (("policy", _POLICY.value), ("start", _START.value)):
    config = make_config(run, answered, settings.LOG_PROBABILITIES)
    lines, _ = predict(config, os.path.join(_OUTPUT.value, f"by_{name}"))
    logprobs.append([line["logprob"] for line in lines])
  kl = sum(mine - before for mine, before in zip(*logprobs, strict=True)) / len(logprobs[0])
  found = json.dumps({"kl": kl}) + "\n"
  storage.write(os.path.join(_OUTPUT.value, "divergence.json"), found)


def make_config(run: str, records: str, mode: str) -> ConfigDict:
  """Of a prediction from a run, which samples from the very policy."""
  c = settings.defaults()
  c.mode, c.model.init_from, c.model.dtype = mode, run, "float32"
  c.generation.max_new_tokens, c.generation.temperature = 16, 1.0
  c.data.eval, c.data.images = records, os.path.join(_DATA.value, "images")
  c.batch_size, c.gallery = 60, 0
  return c


def write_answers(path: str, questions: str, lines: list[dict]) -> None:
  """The questions with these answers in place of ranked ones, but for empty answers."""
  with open(questions, encoding="utf-8") as file:
    records = json.load(file)
  answered = []
  for line in lines:
    record = records[line["record"]]
    if line["answer"]:
      turns = [*record["conversations"][:-1], {"from": "gpt", "value": line["answer"]}]
      answered.append(record | {"conversations": turns})
  storage.write(path, json.dumps(answered))


if __name__ == "__main__":
  cli.run(main)
