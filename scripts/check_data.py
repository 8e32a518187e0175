"""Checks a run's data without training: reads and tokenises every record, decodes every picture.

python scripts/check_data.py --config=configs/sft.py:PRESET [--show=N] [--config.KEY=VALUE ...]

Takes the config of the run, so that template, tokenizer, length and image processor are the run's.
Prints what data.train and data.eval hold, then every bad record with its reason; ends with exit
code 1 if there is one.
"""

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli, config
from vlalign_jax.data import check
from vlalign_jax.weights import source


def check_data(c, show: int = 0) -> list[check.Report]:
  """Checks what a config names; prints the findings."""
  config.check(c, "sft")
  model_source = source.open_source(c.model, c.data.image_aspect)
  reports = []
  for name in ("data.train", "data.eval") if c.data.eval else ("data.train",):
    report = check.check(c, model_source, name)
    print("\n".join(check.describe(c, report)))
    for number in range(min(show, len(report.records))):
      print(f"\n{report.records[number].where}\n{check.render(report.load, number)}")
    reports.append(report)
    print()
  print("\n".join(check.summary(reports)))
  return reports


def main(_):
  reports = check_data(flags.FLAGS.config, flags.FLAGS.show)
  return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_integer("show", 0, "Prints so many examples, what is learnt as «...».", 0)
  cli.run(main)
