"""Checks a run's data without training: reads and tokenizes every record, decodes every picture.

python scripts/check_data.py --config=configs/STAGE.py:PRESET [--show=N] [--config.KEY=VALUE ...]

Takes the config of the run, so that template, tokenizer, length and image processor are the run's.
Describes data.train and data.eval, then prints every bad record with its reason; the exit code is 1
if there is one.
"""

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli, stages
from vlalign_jax.input_pipeline import check, report
from vlalign_jax.weights import source


def check_data(c, show: int = 0) -> list[check.Report]:
  """Checks the data of a config and prints reports, with the first `show` examples of each."""
  stage = stages.of_config(c)
  stage.check(c)
  model_source = source.open_source(c.model, c.data.image_aspect)
  reports = []
  for name in ("data.train", "data.eval") if c.data.eval else ("data.train",):
    checked = check.check(stage.task, c, model_source, name)
    print("\n".join(report.describe(c, checked)))
    for number in range(min(show, len(checked.records))):
      print(f"\n{checked.records[number].where}\n{report.render(checked.load, number)}")
    reports.append(checked)
    print()
  print("\n".join(report.summary(reports)))
  return reports


def main(_):
  reports = check_data(flags.FLAGS.config, flags.FLAGS.show)
  return 1 if any(checked.problems for checked in reports) else 0


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_integer("show", 0, "Number of examples to print, learned text as «...».", 0)
  cli.run(main)
