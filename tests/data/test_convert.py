"""Converts small samples of published preference data to records that the stages read."""

import json

import pytest

from scripts import convert_data
from tests.bad_inputs.failing import fails
from vlalign_jax.data.conversations import Turn
from vlalign_jax.data.records import Options, load_records


def human(value="<image>\nWho?"):
  return {"from": "human", "value": value}


def gpt(value="they"):
  return {"from": "gpt", "value": value}


def human_preference(**fields):
  """Returns an entry as in llava_7b_v1_preference.json."""
  return {
    "id": "000000372405",
    "image": "a.png",
    "conversations": [human(), gpt("you"), human("No:"), gpt("the reference")],
    "output_1": {"from": "llava", "value": "one"},
    "output_2": {"from": "llava", "value": "two"},
    "preference": 2,
    "hallucination": False,
    **fields,
  }


def rlaif_v(**fields):
  return {
    "ds_name": "RLAIF-V",
    "image": "a.png",
    "question": "Who?",
    "chosen": "one",
    "rejected": "two",
    "origin_dataset": "LCS-558K",
    "origin_split": '{"model": "llava15-7b", "type": "detailed"}',
    "idx": "17",
    "image_path": "x/1.jpg",
    **fields,
  }


def feedback_mix(**fields):
  messages = [human("Who?"), {"from": "gpt", "preference_values": ["one", "two"]}]
  return {
    "id": 5,
    "origin_pre_dataset": "vlfeedback",
    "image": "a.png",
    "image_path": "x/1.jpg",
    "conversations": json.dumps(messages),
    **fields,
  }


ASKED = (Turn("<image>\nWho?", None),)
SHORT = {"conversations": [human(), gpt("the reference")]}
GOOD = {
  "the second is better": (
    human_preference(),
    ("000000372405", (Turn("<image>\nWho?", "you"), Turn("No:", None)), ("two", "one")),
  ),
  "the first is better": (
    human_preference(preference=1, **SHORT),
    ("000000372405", ASKED, ("one", "two")),
  ),
  "without a reference": (
    human_preference(conversations=[human()]),
    ("000000372405", ASKED, ("two", "one")),
  ),
  "wrapped once more": (
    human_preference(conversations=[SHORT["conversations"]]),
    ("000000372405", ASKED, ("two", "one")),
  ),
  "RLAIF-V": (rlaif_v(), ("17", ASKED, ("one", "two"))),
  "RLAIF-V, the path alone": (
    rlaif_v(image=None, image_path="a.png"),
    ("17", ASKED, ("one", "two")),
  ),
  "RLAIF-V, the path of the picture": (
    rlaif_v(image={"bytes": None, "path": "a.png"}),
    ("17", ASKED, ("one", "two")),
  ),
  "feedback mix": (feedback_mix(), ("5", ASKED, ("one", "two"))),
  "feedback mix, unpacked": (
    feedback_mix(conversations=json.loads(feedback_mix()["conversations"])),
    ("5", ASKED, ("one", "two")),
  ),
}


@pytest.fixture
def convert(tmp_path):
  """Returns a function `(*entries, **flags)` that converts them and returns the new records."""
  (tmp_path / "a.png").touch()

  def run(*entries, name="out.json", **flags):
    (tmp_path / "in.json").write_text(json.dumps(entries))
    convert_data.convert_data(str(tmp_path / "in.json"), str(tmp_path / name), **flags)
    return load_records(str(tmp_path / name), Options(answers="ranked"))

  return run


@pytest.mark.parametrize("layout", GOOD)
def test_converts(convert, layout):
  entry, expected = GOOD[layout]
  (record,) = convert(entry)
  assert (record.id, record.turns, record.answers) == expected
  assert record.images == ("a.png",)


def test_writes_json_lines(convert, tmp_path):
  records = convert(*(entry for entry, _ in GOOD.values()), name="out.jsonl")
  assert len(records) == len(GOOD)
  assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(GOOD)


BAD = {
  "a tie": (human_preference(preference=0), ['"preference" is 0; it must be 1 or 2']),
  "no second": (human_preference(output_2=None), ['"output_2" is null; give text']),
  "no rejected": (
    {"question": "Who?", "chosen": "a"},
    ['"rejected" is missing; give both'],
  ),
  "malformed conversation": (
    feedback_mix(conversations="[{"),
    ['"conversations" holds malformed JSON', "fix it"],
  ),
  "no conversation": (
    feedback_mix(conversations=[]),
    ['"conversations" is empty; give a list of human and gpt messages'],
  ),
  "something else": ({"text": "Who?"}, ['"conversations" is missing, and there is no "messages"']),
  "a picture that is none": (
    rlaif_v(image={"bytes": "iVBO"}, image_path=None),
    ['"image": "bytes" is text that is not a picture in base64'],
  ),
  "more pictures than named": (
    human_preference(conversations=[human("<image> or <image>?")]),
    ["its questions hold 2 <image> but it has 1 image"],
  ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_record_is_named_and_can_be_left_out(convert, tmp_path, mistake):
  entry, expected = BAD[mistake]
  expected = [f"{tmp_path / 'in.json'}, ", " 1", *expected, "--on_bad_record=skip leaves them out"]
  fails(expected, convert, rlaif_v(), entry)
  assert not (tmp_path / "out.json").exists()
  assert len(convert(rlaif_v(), entry, on_bad_record="skip")) == 1


def test_files(convert, tmp_path):
  convert(rlaif_v())
  fails(["out.json exists; remove it or name another"], convert, rlaif_v())
  skip = {"on_bad_record": "skip", "name": "none.json"}
  fails(["in.json: no record can be converted"], convert, {}, **skip)
  fails(["; 1 more are bad; --on_bad_record"], convert, {}, {}, name="b.json")
  nowhere = "nowhere/out.json"
  fails(
    [nowhere, "cannot be written (No such file or directory)"], convert, rlaif_v(), name=nowhere
  )
  source, output = str(tmp_path / "in.json"), str(tmp_path / "c.json")
  fails(["--input is missing"], convert_data.convert_data, "", output)
  fails(["--output is missing"], convert_data.convert_data, source, "")
  fails(["none.json: no such file; check"], convert_data.convert_data, "none.json", output)
