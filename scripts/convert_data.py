"""Converts published preference data to records that reward models and DPO learn from.

  python scripts/convert_data.py --input=FILE --output=FILE [--on_bad_record=skip]

reads LLaVA-Human-Preference-10K, RLAIF-V or vision-feedback-mix-binarized (recognized by their
keys) and writes LLaVA records whose last answer is a list, best first. Both files are JSON, or JSON
lines if the name ends with .jsonl. If the hub has a data set as parquet, export its rows first:

  import datasets, json
  with open("rlaif_v.jsonl", "w") as file:
    for number, row in enumerate(datasets.load_dataset("openbmb/RLAIF-V-Dataset", split="train")):
      row["image"].convert("RGB").save(f"images/{number}.jpg")
      file.write(json.dumps(row | {"image": f"{number}.jpg"}) + "\\n")

Pictures are not read; scripts/check_data.py does that.
"""

import json
import os

from absl import flags, logging

from vlalign_jax import cli
from vlalign_jax.data import convert
from vlalign_jax.data.json_entries import is_json_lines
from vlalign_jax.errors import InputError


def convert_data(source: str, output: str, on_bad_record: str = "error") -> int:
  """Converts a file and returns the number of records written.

  Raises:
    InputError: the file cannot be read, a record is bad and not to be skipped, or the output
      cannot be written.
  """
  for flag, path in (("input", source), ("output", output)):
    if not path:
      raise InputError(f"--{flag} is missing: the file to {'read' if flag == 'input' else 'write'}")
  if not os.path.isfile(source):
    raise InputError(f"--input {source}: no such file; check its path")
  records, errors = convert.convert(source)
  if errors and on_bad_record == "error":
    more = f"; {len(errors) - 1} more are bad" if len(errors) > 1 else ""
    raise InputError(f"{errors[0]}{more}; --on_bad_record=skip leaves them out")
  for error in errors:
    logging.warning("Left out: %s", error)
  if not records:
    raise InputError(f"{source}: no record can be converted")
  try:
    with open(output, "x", encoding="utf-8") as file:
      if is_json_lines(output):
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
      else:
        json.dump(records, file, ensure_ascii=False, indent=1)
  except FileExistsError as error:
    raise InputError(f"--output {output} exists; remove it or name another file") from error
  except OSError as error:
    raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
  logging.info("%s: %d records; %d left out", output, len(records), len(errors))
  return len(records)


def main(_):
  convert_data(flags.FLAGS.input, flags.FLAGS.output, flags.FLAGS.on_bad_record)


if __name__ == "__main__":
  flags.DEFINE_string("input", "", "The file to read.")
  flags.DEFINE_string("output", "", "The file to write; must not exist.")
  flags.DEFINE_enum("on_bad_record", "error", ("error", "skip"), "What to do with one.")
  cli.run(main)
