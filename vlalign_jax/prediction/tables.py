"""Answers as a table with pictures, for the writers of a run."""

from collections.abc import Sequence

from PIL import Image

from vlalign_jax import html
from vlalign_jax.data import images
from vlalign_jax.data.records import Record
from vlalign_jax.errors import InputError
from vlalign_jax.writers.writer import Cell, Writer

COLUMNS = ("record", "id", "images", "picture", "prompt", "answer", "reference")
# Further columns, of the values that lines have.
VALUES = (
  *("sample", "rank", "score", "reward", "kl", "logprob", "tokens", "num_tokens", "ended", "best"),
  "reason",
)


def write(
  writers: Sequence[Writer],
  name: str,
  step: int,
  records: Sequence[Record],
  lines: Sequence[dict],
) -> None:
  """Gives a table to the writers that show any.

  Args:
    writers: of the run.
    name: of the table.
    step: that the answers are of.
    records: that the lines number.
    lines: of predictions.jsonl or rollouts.jsonl; without any nothing is written.
  """
  showing = [writer for writer in writers if writer.shows_tables]
  if not showing or not lines:
    return
  values = [name for name in VALUES if any(name in line for line in lines)]
  pictures: dict[int, Image.Image | None] = {}
  rows: list[list[Cell]] = []
  for line in lines:
    number = line["record"]
    if number not in pictures:
      pictures[number] = side_by_side(records[number].image_files)
    said = [line["system"]] if "system" in line else []
    said += [text for turn in line.get("history", ()) for text in turn] + [line["prompt"]]
    cells = number, str(line["id"]), " ".join(line["images"]), pictures[number], "\n".join(said)
    answers = line["answer"], line.get("reference")
    rows.append([*cells, *answers, *(line.get(name) for name in values)])
  for writer in showing:
    writer.table(name, step, (*COLUMNS, *values), rows)


def side_by_side(paths: Sequence[str]) -> Image.Image | None:
  """Returns the pictures of a record as one, each at most 240 pixels wide and high.

  Pictures that cannot be read are left out, as the run has already said so; None without any.
  """
  found = []
  for path in dict.fromkeys(paths):
    try:
      found.append(images.open_image(path))
    except InputError:
      continue
    found[-1].thumbnail((html.THUMBNAIL, html.THUMBNAIL))
  if not found:
    return None
  size = sum(image.width for image in found), max(image.height for image in found)
  joined, left = Image.new("RGB", size, "white"), 0
  for image in found:
    joined.paste(image, (left, 0))
    left += image.width
  return joined
