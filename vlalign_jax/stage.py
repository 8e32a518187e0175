"""What a stage is: one record that training, planning, the checks of data and the scripts read."""

import dataclasses
from collections.abc import Callable

from vlalign_jax import config as configs
from vlalign_jax.config_checks import Config
from vlalign_jax.errors import InputError
from vlalign_jax.input_pipeline.prepare import Task
from vlalign_jax.losses import sums
from vlalign_jax.models.vlm import LANGUAGE, SCORE


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of alignment; `vlalign_jax/stages/` has one file for each.

  Attributes:
    name: as in configs/NAME.py and scripts/train_NAME.py.
    task: what records must have, and how they become examples.
    metrics: what an evaluation reports that the best checkpoints can be chosen by.
    add_keys: adds the stage's own keys, and its own defaults of shared keys, to a config.
    check_keys: raises an InputError for values of the stage's own keys that no run can have.
    head: what the model ends in, LANGUAGE or SCORE.
    make_program: `(config, model, mesh, total_steps) -> steps.program.TrainProgram`; None for a
      stage whose script has a loop of its own.
    summary: sums of an evaluation (`losses.sums`) -> dict of floats, what is reported.
    eval_options: held-out data (Prepared) -> static arguments of the program's eval_step.
    prepare_batches: `(config, workdir, mesh, source, data, share) -> {name of the data: function}`;
      each function adds to a host batch what was computed before training. None: nothing is.
    planned_fields: `(config, (rows, examples, answers)) -> ({name: (shape, dtype)}, sentences)`:
      further fields of a batch for the planner, and what it assumes of them.
    plan: `(config, topology) -> StepPlan` of a stage whose step is several programs. None:
      `planning.train_step` plans `make_program`.
    fill_paths: names, in a config that is only planned, what a run could not go without.
    rows_divide_into: config -> parts that the rows of a step on one device are split into.
  """

  name: str
  task: Task
  metrics: tuple[str, ...]
  add_keys: Callable[[Config], None]
  check_keys: Callable[[Config], None]
  head: str = LANGUAGE
  make_program: Callable | None = None
  summary: Callable = sums.quotients
  eval_options: Callable = lambda held_out: {}
  prepare_batches: Callable | None = None
  planned_fields: Callable = lambda config, sizes: ({}, ())
  plan: Callable | None = None
  fill_paths: Callable[[Config], None] = lambda config: None
  rows_divide_into: Callable[[Config], int] = lambda config: config.grad_accumulation

  def defaults(self) -> Config:
    """Returns all keys of the stage with their defaults; presets start from these."""
    config = configs.shared()
    config.stage = self.name
    self.add_keys(config)
    return config

  def check(self, config: Config) -> None:
    """Refuses a config with unknown or missing keys, or with values that no run can have.

    Raises:
      InputError: names the first such key and how to correct it.
    """
    if config is None:
      raise InputError(f"--config is missing: such as --config=configs/{self.name}.py:PRESET")
    configs.check_keys(config, self.defaults())
    if config.stage != self.name:
      raise InputError(f"this is a config of the stage {config.stage!r}, not {self.name!r}")
    configs.check_shared(config, self.metrics)
    if config.data.concatenate > 1 and self.task.answers != "one":
      raise InputError(
        f"config.data.concatenate is {config.data.concatenate}; only conversations of sft are "
        "joined, set it to 1"
      )
    adapters = config.lora.rank or config.lora.vision_rank
    parts = ("vision", "projector", "language", "embeddings")
    # A score head is trained in any case.
    if not (adapters or any(config.train[part] for part in parts) or self.head == SCORE):
      raise InputError("nothing to train: set one of config.train.vision, .projector, .language")
    self.check_keys(config)
