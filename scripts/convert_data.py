"""Converts data of any shape that the stages read to LLaVA records with pictures as files.

  python scripts/convert_data.py --input=FILE --output=FILE [--images=DIR] [--on_bad_record=skip]

The input is all that data.train may name: JSON, JSON lines, Parquet, a directory of `datasets`, in
the shapes of docs/data.md. Ranked answers become a list, best first. The stages read the same files
directly; a converted file can be read, edited and taken elsewhere. The output is JSON, or JSON
lines if its name ends with .jsonl.

Paths of pictures stay as they are. Pictures that the input holds are written to --images, and their
paths are relative to it. Other pictures are not looked for; scripts/check_data.py does that.
"""

import os

from absl import flags, logging

from vlalign_jax import cli
from vlalign_jax.data import bad_records, convert
from vlalign_jax.errors import InputError


def convert_data(
  source: str, output: str, on_bad_record: str = "error", images: str = "", placeholders="match"
) -> int:
  """Converts a file and returns the number of records written.

  Raises:
    InputError: the file cannot be read, a record is bad and not to be skipped, or the output
      cannot be written.
  """
  for flag, path in (("input", source), ("output", output)):
    if not path:
      raise InputError(f"--{flag} is missing: the file to {'read' if flag == 'input' else 'write'}")
  convert.check_new(output, "--output")
  directory = os.path.abspath(images or os.path.dirname(output) or ".")
  records, errors = convert.convert(source, directory, placeholders)
  if errors and on_bad_record == "error":
    more = f"; {len(errors) - 1} more are bad" if len(errors) > 1 else ""
    raise InputError(f"{errors[0]}{more}; --on_bad_record=skip leaves them out")
  bad_records.warn(source, errors)
  if not records:
    raise InputError(f"{source}: no record can be converted")
  convert.write(output, records, "--output")
  logging.info("%s: %d records; %d left out", output, len(records), len(errors))
  return len(records)


def main(_):
  values = flags.FLAGS
  convert_data(
    values.input, values.output, values.on_bad_record, values.images, values.placeholders
  )


if __name__ == "__main__":
  flags.DEFINE_string("input", "", "The file or directory to read.")
  flags.DEFINE_string("output", "", "The file to write; must not exist.")
  flags.DEFINE_string("images", "", "Where pictures inside the input go; else next to the output.")
  flags.DEFINE_enum("on_bad_record", "error", ("error", "skip"), "What to do with one.")
  flags.DEFINE_enum("placeholders", "match", ("match", "first"), "As the key data.placeholders.")
  cli.run(main)
