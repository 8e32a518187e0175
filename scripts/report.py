"""Shows training runs and predictions on one HTML page that needs no other file.

python scripts/report.py [--output=FILE] RUN [RUN ...]

RUN is the --workdir of a training run, finished or not, or of a prediction. The page has the curves
of a stage's runs over each other, held-out figures, time and memory, configuration, and samples
with pictures. It is written to report.html in the first RUN, unless --output names another file.
"""

from absl import flags, logging

from vlalign_jax import cli, storage
from vlalign_jax.errors import InputError
from vlalign_jax.report import directory
from vlalign_jax.report.page import page


def report(places: list[str], output: str = "") -> str:
  """Writes the page of some directories and returns where it is.

  Args:
    places: directories of runs and predictions.
    output: the file to write; empty: report.html in the first directory.

  Raises:
    InputError: a directory cannot be shown, or the file cannot be written.
  """
  if not places:
    raise InputError("no directory is given: python scripts/report.py RUN [RUN ...]")
  content = page(directory.read_all(places))
  output = output or f"{storage.absolute(places[0])}/report.html"
  storage.check(output, "--output")
  try:
    storage.write(output, content)
  except OSError as error:
    message = f"{output}: cannot be written ({error.strerror}); name another place with --output"
    raise InputError(message) from error
  logging.info("%s: %d directories, %.1f MB", output, len(places), len(content.encode()) / 1e6)
  return output


def main(arguments):
  report(arguments[1:], flags.FLAGS.output)


if __name__ == "__main__":
  flags.DEFINE_string("output", "", "The file to write; default: report.html in the first RUN.")
  cli.run(main, arguments=True)
