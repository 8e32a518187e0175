"""Checks a run's data without training: reads and tokenises every record, decodes every picture.

python scripts/check_data.py --config=configs/STAGE.py:PRESET [--show=N] [--config.KEY=VALUE ...]

Takes the config of the run, so that template, tokenizer, length and image processor are the run's.
Prints what data.train and data.eval hold, then every bad record with its reason; ends with exit
code 1 if there is one.
"""

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli, stages
from vlalign_jax.input_pipeline import check, report
from vlalign_jax.weights import source


def check_data(c, show: int = 0) -> list[check.Report]:
  """Checks what a config names; prints the findings."""
  stage = stages.of_config(c)
  stage.check(c)
  model_source = source.open_source(c.model, c.data.image_aspect)
  reports = []
  for name in ("data.train", "data.eval") if c.data.eval else ("data.train",):
    found = check.check(stage.task, c, model_source, name)
    print("\n".join(report.describe(c, found)))
    for number in range(min(show, len(found.records))):
      print(f"\n{found.records[number].where}\n{report.render(found.load, number)}")
    reports.append(found)
    print()
  print("\n".join(report.summary(reports)))
  return reports


def main(_):
  reports = check_data(flags.FLAGS.config, flags.FLAGS.show)
  return 1 if any(found.problems for found in reports) else 0


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_integer("show", 0, "Prints so many examples, what is learnt as «...».", 0)
  cli.run(main)
