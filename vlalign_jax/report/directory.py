"""What a report reads from a directory: of a training run, or of a prediction."""

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from vlalign_jax import json_lines, stages, storage, trees
from vlalign_jax.errors import InputError
from vlalign_jax.prediction import directory as predictions
from vlalign_jax.prediction import settings
from vlalign_jax.rollout import samples
from vlalign_jax.runs import run_directory

METRICS, NUMBERS = "metrics.jsonl", "metrics.json"
_FIX = "delete this line"


@dataclasses.dataclass(frozen=True)
class Run:
  """A directory as the report shows it.

  Attributes:
    name: the shortest end of its path that no other directory of the report has.
    stage: of the run; `predict` for a prediction.
    config: dotted key -> value, with the defaults of keys that it lacks.
    defaults: dotted key -> default of the stage.
    lines: of metrics.jsonl; none for a prediction.
    numbers: of a prediction's metrics.json.
    samples: lines of rollouts.jsonl of its newest rollout, or of predictions.jsonl.
  """

  name: str
  stage: str
  config: dict
  defaults: dict
  lines: list[dict]
  numbers: dict
  samples: list[dict]

  def evaluations(self) -> dict[int, dict[str, float]]:
    """Returns step -> held-out metrics there, without those that are not finite."""
    found = {}
    for line in self.lines:
      values = {k: v for k, v in line.items() if k.startswith("eval/") and v is not None}
      if values:
        found.setdefault(line["step"], {}).update(values)
    return found


def read_all(places: Sequence[str]) -> list[Run]:
  """Reads directories.

  Args:
    places: paths or URLs, at least one.

  Raises:
    InputError: a directory is there twice, or is not one of a run that has begun or of a
      prediction that is finished.
  """
  places = [storage.absolute(place) for place in places]
  for place in places:
    if places.count(place) > 1:
      raise InputError(f"{place} is given twice; name each directory once")
  return [_read(place, name) for place, name in zip(places, _names(places), strict=True)]


def _names(places: list[str]) -> list[str]:
  """Returns for each place the end of its path that is its own; one is not the end of another."""
  names = []
  for place in places:
    parts = place.split("/")
    ends = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    others = [f"/{other}" for other in places if other != place]
    names.append(next(e for e in ends if not any(other.endswith(f"/{e}") for other in others)))
  return names


def _read(place: str, name: str) -> Run:
  storage.check(place, "the directory")
  path = epath.Path(place)
  if not path.is_dir():
    raise InputError(f"{place} is not a directory; name the --workdir of a run or of a prediction")
  stage = _stage(path)
  if stage == settings.STAGE:
    defaults = settings.defaults()
  elif stage in stages.STAGES:
    defaults = stages.defaults(stage)
  else:
    raise InputError(
      f"{place} has a config of the stage {stage!r}; name a run of {', '.join(stages.STAGES)}, or "
      "a prediction"
    )
  config = run_directory.stored_config(place, defaults)
  lines, numbers = [], {}
  if stage == settings.STAGE:
    numbers = _numbers(path / NUMBERS)
    found = json_lines.read(f"{place}/{predictions.PREDICTIONS}", "record", _FIX)
  else:
    lines = json_lines.read(f"{place}/{METRICS}", "step", _FIX)
    if not lines:
      raise InputError(f"{place} has no numbers yet; {METRICS} is written from the first step on")
    found = json_lines.read(f"{place}/{samples.FILE}", "step", _FIX)
    newest = max((line["step"] for line in found), default=0)
    found = [line for line in found if line["step"] == newest]
  return Run(name, stage, _flat(config), _flat(defaults.to_dict()), lines, numbers, found)


def _stage(path: epath.Path) -> str | None:
  """Returns the stage that a directory's config.json names."""
  try:
    return json.loads((path / "config.json").read_text()).get("stage")
  except FileNotFoundError as error:
    raise InputError(
      f"{path} has no config.json; name the --workdir of a run or of a prediction"
    ) from error
  except (ValueError, AttributeError) as error:
    raise InputError(f"{path}/config.json is not a config ({error}); restore it") from error


def _flat(config: dict) -> dict:
  return {key.replace("/", "."): value for key, value in trees.flatten(config).items()}


def _numbers(path: epath.Path) -> dict:
  try:
    numbers = json.loads(path.read_text())
    if not isinstance(numbers, dict):
      raise ValueError("not an object")
    return numbers
  except FileNotFoundError as error:
    raise InputError(
      f"{path.parent} has no {NUMBERS} yet; repeat the command of the prediction to finish it"
    ) from error
  except ValueError as error:
    raise InputError(
      f"{path} is not JSON ({error}); delete it and repeat the command of the prediction"
    ) from error
