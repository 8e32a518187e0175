"""Where to look when a run has ended."""

import os

from etils import epath

_PAGES = ("examples.html", "rollouts.html", "metrics.jsonl")


def where_to_look(workdir: str) -> str:
  """Returns one line with the files of a run directory, and the commands that show its numbers."""
  names = [name for name in _PAGES if (epath.Path(workdir) / name).exists()]
  in_checkout = os.path.isfile(os.path.join("scripts", "report.py"))
  commands = [f"{'python scripts/report.py' if in_checkout else 'vlalign-report'} {workdir}"]
  if any(epath.Path(workdir).glob("events.out.tfevents.*")):
    commands.append(f"tensorboard --logdir {workdir}")
  return f"look at {', '.join(names)} in {workdir}; {'; '.join(commands)}"
