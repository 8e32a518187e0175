"""What users get wrong ends in one clear line: file, record or key, and the mend."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scripts import export_hf, train_sft
from tests import checkpoints, sft_run
from vlalign_jax import storage
from vlalign_jax.data import sft as data
from vlalign_jax.errors import InputError
from vlalign_jax.training import loop
from vlalign_jax.weights import source

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  checkpoints.make_llava(str(directory))
  return directory


@pytest.fixture
def records(tmp_path):
  """24 good records; their pictures are in tmp_path / "data"."""
  return sft_run.make_records(str(tmp_path / "data"), 24)


@pytest.fixture
def train(model, tmp_path):
  """`(records, **overrides)`: trains on them in tmp_path / "run"."""

  def run(records, **overrides):
    path = tmp_path / "data" / "train.json"
    if isinstance(records, str):
      path.write_text(records)
    else:
      sft_run.write_json(path, records)
    settings = {"data.shuffle": False, "save_every": 2, **overrides}  # four records a step
    train_sft.train_and_evaluate(
      sft_run.make_config(model, path, **settings), str(tmp_path / "run")
    )

  return run


def _fails(expected: list[str], call, *args, **kwargs) -> str:
  """Calls; checks that one line of error has all of `expected`; returns it."""
  with pytest.raises(InputError) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  for part in expected:
    assert part in message
  assert "\n" not in message
  return message


# --- Record files: before anything is computed ---


def _edit(index, *path, value):
  def edit(records):
    holder = records[index]
    for key in path[:-1]:
      holder = holder[key]
    holder[path[-1]] = value
    return records

  return edit


BAD_FILES = {
  "image missing": (
    _edit(3, "image", value=["none.png"]),
    ['record 3 ("id": "r3")', 'image "none.png" not found under', "set data.images"],
  ),
  "image outside": (
    _edit(3, "image", value=["../../etc/passwd"]),
    ["record 3", 'image "../../etc/passwd" leaves the image root', "move it there"],
  ),
  "image absolute": (
    _edit(3, "image", value=["/etc/passwd"]),
    ["record 3", "absolute path", "relative to data.images"],
  ),
  "more placeholders than images": (
    _edit(3, "conversations", 2, "value", value="<image> And this?"),
    ["record 3", "hold 2 <image> but it has 1 image", "agree"],
  ),
  "fewer placeholders than images": (
    _edit(6, "conversations", 0, "value", value="<image> What?"),
    ["record 6", "hold 1 <image> but it has 2 images", "agree"],
  ),
  "image placeholder in an answer": (
    _edit(3, "conversations", 1, "value", value="<image>"),
    ["record 3", "conversations[1]", "the answer holds <image>"],
  ),
  "wrong role": (
    _edit(3, "conversations", 1, "from", value="human"),
    ["record 3", 'conversations[1]: "from" is "human" where "gpt" is expected', "take turns"],
  ),
  "unknown role": (
    _edit(3, "conversations", 0, "from", value="system"),
    ["record 3", 'conversations[0]: "from" is "system" where "human" is expected'],
  ),
  "empty answer": (
    _edit(3, "conversations", 1, "value", value="  "),
    ["record 3", "conversations[1]: the answer is empty", "drop the record"],
  ),
  "empty question": (
    _edit(4, "conversations", 0, "value", value=""),
    ["record 4", "the question is empty"],
  ),
  "answer missing": (
    lambda records: [records[0] | {"conversations": records[0]["conversations"][:1]}],
    ["record 0", "the last question has no answer", "add it"],
  ),
  "value of another type": (
    _edit(3, "conversations", 1, "value", value=7),
    ["record 3", 'conversations[1]: "value" is a number', "give text"],
  ),
  "no conversations": (
    _edit(3, "conversations", value=[]),
    ["record 3", '"conversations" is empty', "give a list"],
  ),
  "record is no object": (lambda records: [*records, "text"], ["record 24", "text, not an object"]),
  "empty file": (lambda records: "", ["train.json", "the file is empty", "give a list"]),
  "empty list": (lambda records: [], ["train.json", "list of records is empty", "at least one"]),
  "malformed JSON": (
    lambda records: json.dumps(records, indent=1)[:-30],
    ["train.json", "malformed JSON at line", "mend it"],
  ),
  "JSON lines named .json": (
    lambda records: "\n".join(map(json.dumps, records)),
    ["train.json", "line 2, column 1", "name it .jsonl"],
  ),
  "no list": (
    lambda records: records[0],
    ["train.json", "an object, not a list of records", "[ ]"],
  ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_record_file(train, records, tmp_path, name):
  change, expected = BAD_FILES[name]
  _fails(["data/train.json", *expected], train, change(records))
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_first_bad_record_tells_of_the_others(train, records):
  for index in (2, 5, 9):
    records[index]["conversations"][1]["value"] = ""
  _fails(["record 2", "2 more records are bad", "scripts/check_data.py"], train, records)


def test_missing_files(train, records, tmp_path):
  _fails(["none.json: no such file"], train, records, **{"data.eval": "none.json"})
  nowhere = str(tmp_path / "nowhere")
  _fails([nowhere, "no such directory", "data.images"], train, records, **{"data.images": nowhere})


def test_nothing_to_learn(train, records):
  expected = ["data.train", "no record that is shown has an answer that fits data.max_length=16"]
  _fails(expected, train, records, **{"data.max_length": 16})


def _too_long(records):
  turns = sft_run.conversation("why " * 300, "so")
  return [{"id": record["id"], "conversations": turns} for record in records]


@pytest.mark.parametrize("length", [{"steps": 2}, {"epochs": 0.5}, {"epochs": 2.0}])
@pytest.mark.parametrize("weights", ["1,0", "0.1,0"])
def test_nothing_to_learn_where_the_weights_are(train, records, tmp_path, length, weights):
  """...are long records only; the others are never shown."""
  long = _too_long(records)
  good = sft_run.write_json(tmp_path / "data" / "good.json", records)
  settings = {"data.train": f"{tmp_path}/data/train.json,{good}", "data.weights": weights}
  _fails(["data.train: no record that is shown", "raise it"], train, long, **settings, **length)


def test_the_only_record_that_fits_is_not_drawn(train, records):
  """...in the hundredth of an epoch that is shown."""
  long = _too_long(records)
  settings = {"data.weights": "0.01"}
  _fails(["data.train: no record that is shown"], train, [records[0], *long], **settings)


def test_more_samples_than_records(train, records):
  _fails(["has 24 records", "25 of data.samples"], train, records, **{"data.samples": "25"})


# --- Pictures that cannot be decoded: known only when they are read ---


def _break(picture: pathlib.Path, how: str) -> None:
  content = picture.read_bytes()
  picture.write_bytes({"corrupt": b"no picture", "truncated": content[:-40], "empty": b""}[how])


def _steps(tmp_path) -> list[int]:
  return sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("how", ["corrupt", "truncated", "empty"])
def test_unreadable_picture_ends_the_run(train, records, tmp_path, compile_cache, how, caplog):
  """...at its step, with what was saved before whole; the run goes on with on_bad_record=skip."""
  picture = tmp_path / "data" / "016.png"
  content = picture.read_bytes()
  _break(picture, how)
  expected = ['data/train.json, record 16 ("id": "r16")', "016.png", "cannot be decoded", "replace"]
  _fails(expected, train, records)
  assert _steps(tmp_path) == [2, 4]  # record 16 is of step 5

  if how == "corrupt":
    with caplog.at_level("WARNING", logger="absl"):
      train(records, **{"data.on_bad_record": "skip"})
    (warning,) = [line for line in caplog.messages if "Left out of step 5" in line]
    for part in expected:
      assert part in warning
    bad = [line["bad_records"] for line in sft_run.read_metrics(tmp_path / "run")]
    assert bad == [0, 0, 0, 0, 1, 1]
  else:
    picture.write_bytes(content)
    train(records)
  assert _steps(tmp_path) == [4, 6]


def test_unreadable_picture_of_the_evaluation(train, records, tmp_path):
  """...is known before the first step, however late the first evaluation is."""
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[15:17])
  _break(tmp_path / "data" / "016.png", "truncated")
  expected = ['data/eval.json, record 1 ("id": "r16")', "016.png", "cannot be decoded"]
  _fails(expected, train, records[:12], **{"data.eval": held_out})
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unreadable_picture_of_the_evaluation_is_skipped_and_counted(
  train, records, tmp_path, compile_cache
):
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[15:18])
  _break(tmp_path / "data" / "016.png", "truncated")
  settings = {"data.eval": held_out, "data.on_bad_record": "skip", "eval_every": 2}
  train(records[:12], **settings)
  lines = [line for line in sft_run.read_metrics(tmp_path / "run") if "eval/loss" in line]
  assert [(line["eval/bad_records"], line["eval/examples"]) for line in lines] == [(1, 2)] * 2
  assert [line["bad_records"] for line in lines] == [0, 0]


@pytest.mark.parametrize(("first", "last", "bad"), [(15, 20, 2), (16, 17, 1)])
def test_too_many_unreadable_pictures_of_the_evaluation(
  train, records, tmp_path, monkeypatch, compile_cache, first, last, bad
):
  """...before the first step, and where they become unreadable later."""
  held_out = sft_run.write_json(tmp_path / "data" / "eval.json", records[first:last])
  for index in (16, 18):
    _break(tmp_path / "data" / f"{index:03d}.png", "corrupt")
  expected = [f"data.eval: {bad} of {last - first} records could not be read, more than 1%"]
  settings = {"data.eval": held_out, "data.on_bad_record": "skip"}
  _fails(expected, train, records[:12], **settings)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
  monkeypatch.setattr(data.Prepared, "read", lambda *_, **__: [])
  _fails(expected, train, records[:12], **settings)
  assert _steps(tmp_path) == [2, 3]  # nothing is lost but the evaluation
  lines = sft_run.read_metrics(tmp_path / "run")
  assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (3, True)]


def test_too_many_unreadable_pictures(train, records, tmp_path, compile_cache):
  for index in (1, 16):  # 2 of 24
    _break(tmp_path / "data" / f"{index:03d}.png", "corrupt")
  expected = [
    "data.train: 2 of 24 records could not be read, more than 1%",
    "scripts/check_data.py",
  ]
  _fails(expected, train, records, **{"data.on_bad_record": "skip"})


def test_the_same_unreadable_picture_in_every_epoch_is_not_too_many(compile_cache):
  """The limit is a share of what was shown: 1 of 150 records is 10 of 1500 examples."""
  loop.check_bad_records("data.train", 10, 1500)
  with pytest.raises(InputError):
    loop.check_bad_records("data.train", 16, 1500)


# --- Too long ---


def test_too_long_records_are_counted(model, records, tmp_path, caplog):
  records[0]["conversations"][0]["value"] += " and" * 300
  records[3]["conversations"][2]["value"] += " and" * 300
  path = sft_run.write_json(tmp_path / "data" / "train.json", records)
  config = sft_run.make_config(model, path)
  found, _ = data.load_records_of(config)
  with caplog.at_level("INFO", logger="absl"):
    prepared = data.prepare_train(config, source.open_source(config.model), found, 1)
  assert prepared.records == 23
  assert "24 records; 1 skipped, their first answer does not fit" in caplog.text
  assert "1 turns dropped from the ends of 1 others" in caplog.text
  assert sorted(prepared.plan.examples) == list(range(1, 24))


# --- Models ---


def _changed(name, **values):
  def change(directory):
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(content | values))

  return change


def _without(*names):
  def change(directory):
    for name in names:
      (directory / name).unlink()

  return change


def _with(name, text):
  return lambda directory: (directory / name).write_text(text)


BAD_MODELS = {
  "directory missing": (shutil.rmtree, ["no config.json there", "Hugging Face model directory"]),
  "config missing": (_without("config.json"), ["no config.json there"]),
  "config damaged": (_with("config.json", "{"), ["config.json", "not a valid JSON file"]),
  "config of another model": (
    _changed("config.json", model_type="bert"),
    ["a model of type 'bert', not 'llava'"],
  ),
  "config of an unknown model": (
    _changed("config.json", model_type="wuff"),
    ["config.json", "model type `wuff`"],
  ),
  "tokenizer missing": (
    _without("tokenizer.json", "tokenizer_config.json"),
    ["no tokenizer.json", "copy the tokenizer's files"],
  ),
  "tokenizer damaged": (_with("tokenizer.json", "{"), ["tokenizer cannot be loaded", "copy"]),
  "processor missing": (
    _without("preprocessor_config.json"),
    ["no preprocessor_config.json", "copy it from the model whose vision tower this is"],
  ),
  "processor of another size": (
    _changed(
      "preprocessor_config.json",
      size={"shortest_edge": 20},
      crop_size={"height": 20, "width": 20},
    ),
    ["makes 20 x 20 pictures", "vision tower takes 12 x 12", "mend preprocessor_config.json"],
  ),
  "another image token": (
    _changed("config.json", image_token_index=7, image_token_id=7),
    ["image_token_index 7", "the tokenizer has <image> at", "mend"],
  ),
  "generation config damaged": (_with("generation_config.json", "{"), ["generation_config.json"]),
  "weights missing": (_without("model.safetensors"), ["no model.safetensors"]),
  "pickled weights only": (
    lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
    ["only pickled weights", "not read", "save them as safetensors"],
  ),
  "weights cut off": (
    lambda directory: os.truncate(directory / "model.safetensors", 9000),
    ["model.safetensors: damaged or cut off", "copy it again"],
  ),
  "shard missing": (
    _with("model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'),
    ["model.safetensors.index.json", "not there: model-2.safetensors"],
  ),
  "index damaged": (
    _with("model.safetensors.index.json", "[]"),
    ["model.safetensors.index.json: not a safetensors index"],
  ),
  "feature layer": (
    _changed("config.json", vision_feature_layer=9),
    ["vision_feature_layer 9 of a tower with 3 layers", "choose from -4 to 3"],
  ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(train, records, model, tmp_path, name):
  change, expected = BAD_MODELS[name]
  copy = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
  change(copy)
  _fails([str(copy), *expected], train, records, **{"model.init_from": str(copy)})


def test_tensors_that_do_not_fit(train, records, model, tmp_path):
  copy = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
  text = json.loads((copy / "config.json").read_text())["text_config"]
  _changed("config.json", text_config=text | {"intermediate_size": 64})(copy)
  with pytest.raises(InputError, match="6 tensors do not fit.*\n.*mlp.*is .*48.*not .*64"):
    train(records, **{"model.init_from": str(copy)})


def test_bad_choice_of_model(train, records, model):
  both = "give either model.init_from"
  _fails([both], train, records, **{"model.vision": str(model)})
  _fails([both], train, records, **{"model.init_from": ""})
  towers = {"model.init_from": "", "model.vision": str(model)}
  _fails(["model.language is empty", "a LLaMA directory"], train, records, **towers)
  towers["model.language"] = str(model)
  _fails([str(model), "language model of type 'llava'"], train, records, **towers)


# --- Settings that the machine, the tokenizer or the run directory does not allow ---


def test_mesh_that_does_not_fit(train, records):
  settings = {"mesh.data": 3, "mesh.fsdp": 7}
  _fails(
    ["mesh.data=3, mesh.fsdp=7, mesh.tensor=1 make 21 devices, and there are", "whose product is"],
    train,
    records,
    **settings,
  )


def test_unknown_template(train, records):
  settings = {"data.template": "vicunna"}
  _fails(['"vicunna" is not one of', 'did you mean "vicuna"?'], train, records, **settings)


def test_workdir_that_cannot_be_written(model, records, tmp_path):
  config = sft_run.make_config(model, sft_run.write_json(tmp_path / "data" / "train.json", records))
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    _fails(
      [f"--workdir {workdir}", "cannot be written to"],
      train_sft.train_and_evaluate,
      config,
      str(workdir),
    )
  _fails(["--workdir is missing"], train_sft.train_and_evaluate, config, "")


def test_workdir_that_is_a_url(model, records, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = sft_run.make_config(model, sft_run.write_json(tmp_path / "data" / "train.json", records))
  monkeypatch.setattr(storage, "_MODULES", ("gcsfs_that_is_missing",))
  expected = ["--workdir gs://bucket/run needs libraries", "pip install gcsfs google-cloud-storage"]
  _fails(expected, train_sft.train_and_evaluate, config, "gs://bucket/run")
  expected = ["--workdir ftp://host/run: only gs:// is supported", "mount other storage"]
  _fails(expected, train_sft.train_and_evaluate, config, "ftp://host/run")
  assert os.listdir(tmp_path) == ["data"]  # makedirs would take gs: for a directory


def test_workdir_that_holds_something_else(train, records, tmp_path):
  """...such as a model directory, whose config.json stays as it is."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text('{"model_type": "llava"}')
  _fails(["run/config.json", "not the config of a run", "another --workdir"], train, records)
  assert (tmp_path / "run" / "config.json").read_text() == '{"model_type": "llava"}'
  (tmp_path / "run" / "config.json").write_text('{"stage": "sft"')
  _fails(["run/config.json", "not JSON", "another --workdir"], train, records)


# --- Updates that are not finite ---


def test_ten_updates_in_a_row_that_are_not_finite(train, records, tmp_path, compile_cache):
  """...end the run, whenever it is resumed; what was saved stays, and is finite."""
  absurd = {"optim.learning_rate": 1e30, "optim.warmup": 0.0, "optim.schedule": "constant"}
  expected = ["step 11: loss or gradient was not finite for 10 updates", "lower optim.learning"]
  for _ in range(2):
    _fails(expected, train, records, **absurd, epochs=4.0, save_every=4)
    assert _steps(tmp_path) == [4, 8]
    lines = sft_run.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[0]["loss"] > 0
    assert [(line["loss"], line["skipped_steps"]) for line in lines[1:]] == [
      (None, skipped) for skipped in range(1, 10)
    ]
  with ocp.StandardCheckpointer() as reader:
    saved = [reader.restore(tmp_path / "run" / "checkpoints" / s / "params") for s in "48"]
  jax.tree.map(np.testing.assert_array_equal, *saved)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


# --- Runs that are resumed ---

RESUMED = {"data.shuffle": False, "save_every": 2, "keep": 3}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, compile_cache):
  """A finished run of six steps, saved at 2, 4 and 6, beside its data."""
  directory = tmp_path_factory.mktemp("finished")
  records = sft_run.make_records(str(directory / "data"), 24)
  path = sft_run.write_json(directory / "data" / "train.json", records)
  config = sft_run.make_config(model, path, **RESUMED)
  train_sft.train_and_evaluate(config, str(directory / "run"))
  return directory


@pytest.fixture
def resume(finished, model, tmp_path):
  """`(**overrides)`: repeats the command on the copy of the run in tmp_path / "run"."""
  shutil.copytree(finished / "run", tmp_path / "run")

  def run(train=finished / "data" / "train.json", **overrides):
    config = sft_run.make_config(model, train, **(RESUMED | overrides))
    train_sft.train_and_evaluate(config, str(tmp_path / "run"))

  return run


def test_another_config_is_refused(resume):
  message = _fails(
    ["holds a run with another config", "repeat its command", "choose another --workdir"],
    resume,
    **{"batch_size": 8, "optim.learning_rate": 0.5, "log_every": 3},
  )
  assert "(batch_size: 4 there, 8 now; optim.learning_rate: 0.001 there, 0.5 now)" in message


def test_another_config_is_fine_before_anything_is_saved(resume, tmp_path):
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  resume(seed=7)
  assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 7
  assert len(sft_run.read_metrics(tmp_path / "run")) == 6


OTHER_DATA = {
  "longer question": (
    lambda text: text.replace("Is it a cat?", "Is it a cat, or is it not?"),
    ["as many records, but others"],
  ),
  "fewer records": (
    lambda text: json.dumps(json.loads(text)[:16]),
    ["6 steps then, 4 now", "24 records then, 16 now"],
  ),
  "more records": (
    lambda text: json.dumps(json.loads(text) + json.loads(text)[:1]),
    ["6 steps then, 7 now", "24 records then, 25 now"],
  ),
}


@pytest.mark.parametrize("done", [4, 6])
@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_is_refused(resume, finished, tmp_path, name, done):
  """...however far the run is: 16 records would make four steps."""
  steps = tmp_path / "run" / "checkpoints"
  if done == 4:
    shutil.rmtree(steps / "6")
  path = finished / "data" / "train.json"
  before = path.read_text()
  change, expected = OTHER_DATA[name]
  try:
    path.write_text(change(before))
    expected = [*expected, f"{tmp_path}/run", "restore the files of data.train", "new --workdir"]
    _fails(expected, resume)
  finally:
    path.write_text(before)
  assert _steps(tmp_path) == [2, 4, 6][: done // 2]
  assert len(sft_run.read_metrics(tmp_path / "run")) == 6


def test_half_written_checkpoint_is_ignored(resume, finished, tmp_path):
  steps = tmp_path / "run" / "checkpoints"
  (steps / "6").rename(steps / "6.orbax-checkpoint-tmp")
  shutil.rmtree(steps / "6.orbax-checkpoint-tmp" / "optimizer")
  resume()
  assert _steps(tmp_path) == [2, 4, 6]
  _assert_same_metrics(tmp_path / "run", finished / "run")


def _assert_same_metrics(workdir, expected):
  timing = ("tokens_per_second", "examples_per_second")
  lines, expected_lines = (
    [{key: value for key, value in line.items() if key not in timing} for line in lines]
    for lines in map(sft_run.read_metrics, (workdir, expected))
  )
  assert lines == expected_lines


def _truncate_largest(directory):
  files = [path for path in directory.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)


DAMAGES = {
  "array file cut off": lambda step: _truncate_largest(step / "params"),
  "parameters missing": lambda step: shutil.rmtree(step / "params"),
  "progress damaged": lambda step: (step / "progress" / "metadata").write_text("{"),
}


@pytest.fixture
def leftovers():
  """Ends here the coroutines that Orbax leaves behind when a file cannot be read."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
  resume, finished, tmp_path, caplog, name
):
  DAMAGES[name](tmp_path / "run" / "checkpoints" / "6")
  with caplog.at_level("INFO", logger="absl"):
    resume(save_every=1)  # step 5 is saved although a 6 stands there
  assert "checkpoints/6 cannot be read" in caplog.text
  assert "going on from step 4 of 6" in caplog.text
  assert "checkpoints/6 moved to" in caplog.text
  assert _steps(tmp_path) == [4, 5, 6]
  assert (tmp_path / "run" / "checkpoints-damaged-6").is_dir()
  _assert_same_metrics(tmp_path / "run", finished / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_no_checkpoint_can_be_read(resume, tmp_path):
  for step in (2, 4, 6):
    _truncate_largest(tmp_path / "run" / "checkpoints" / str(step) / "optimizer")
  _fails(["none of the checkpoints [6, 4, 2] can be read", "in a new --workdir"], resume)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_export_of_a_damaged_checkpoint(finished, tmp_path):
  run = shutil.copytree(finished / "run", tmp_path / "run")
  _truncate_largest(run / "checkpoints" / "6" / "params")
  expected = [f"{run}/checkpoints/6 cannot be read", "move it away to use the checkpoint before"]
  _fails(expected, export_hf.export_run, str(run), str(tmp_path / "exported"), None)


# --- The whole way ---


def _run(*arguments):
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
  )


def test_scripts_end_with_one_line_and_code_1(tmp_path, model, records):
  """The whole way once: the message is all that a script prints."""
  train = sft_run.write_json(tmp_path / "data" / "train.json", records)
  good = sft_run.make_config(model, train)
  (tmp_path / "data" / "000.png").write_bytes(b"")
  done = _run("scripts/train_sft.py", "--config=configs/sft.py:demo", "--config.data.trian=x")
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: unknown key config.data.trian; did you mean config.data.train?\n"

  done = _run(*sft_run.command_line(good, ""))
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: --workdir is missing: the directory that this run is written to\n"

  script, config, _, *overrides = sft_run.command_line(good, "", "scripts/check_data.py")
  done = _run(script, config, *overrides)
  assert done.returncode == 1
  assert 'train.json, record 0 ("id": "r0"): image "000.png"' in done.stdout
  assert "Traceback" not in done.stdout + done.stderr
