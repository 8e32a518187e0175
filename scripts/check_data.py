"""Checks a run's data without training: reads and tokenizes every record, decodes every picture.

python scripts/check_data.py --config=configs/STAGE.py:PRESET [--show=N] [--page=data.html]
  [--write_good=FILE] [--config.KEY=VALUE ...]

Takes the config of the run, so that template, tokenizer, length and image processor are the run's.
Describes data.train and data.eval, then prints every bad record with its reason; the exit code is 1
if there is one. Writes a page with lengths, picture sizes, examples and the bad records to --page,
and the good records of data.train to --write_good, as JSON or JSON lines (.jsonl).
"""

import os

from absl import flags
from ml_collections import config_flags

from vlalign_jax import cli, stages, storage
from vlalign_jax.data import convert
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline import check, data_page, report
from vlalign_jax.weights import source


def check_data(c, show: int = 0, page: str = "", write_good: str = "") -> list[check.Report]:
  """Checks the data of a config and prints reports, with the first `show` examples of each.

  Args:
    c: the config of a run.
    show: number of examples to print.
    page: where the page is written; empty: nowhere.
    write_good: where the good records of data.train are written; empty: nowhere.

  Raises:
    InputError: the config is wrong, or an output cannot be written.
  """
  convert.check_new(write_good, "--write_good")
  storage.check(page, "--page")
  if page and not storage.is_url(page) and not os.path.isdir(os.path.dirname(page) or "."):
    raise InputError(f"--page {page}: no such directory; make it")
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
  if page:
    try:
      storage.write(page, data_page.page(c, reports))
    except OSError as error:
      raise InputError(f"--page {page}: cannot be written ({error.strerror})") from error
    print(f"written: {page}")
  if write_good:
    convert.write(write_good, check.good_entries(reports[0]), "--write_good")
    total = sum(len(numbers) for numbers in reports[0].good.values())
    print(f"written: {total:,} good records of data.train to {write_good}")
  return reports


def main(_):
  values = flags.FLAGS
  reports = check_data(values.config, values.show, values.page, values.write_good)
  return 1 if any(checked.problems for checked in reports) else 0


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Such as configs/sft.py:llava15_7b.")
  flags.DEFINE_integer("show", 0, "Number of examples to print, learned text as «...».", 0)
  flags.DEFINE_string("page", "data.html", "Where the page is written; empty: nowhere.")
  flags.DEFINE_string("write_good", "", "Where good records of data.train are written.")
  cli.run(main)
