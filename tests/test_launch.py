"""The launchers, with commands in the place of gcloud, sbatch, srun and scontrol."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TPU = ["scripts/launch_tpu_pod.sh", "--name=pod", "--zone=z", "--type=v5litepod-16", "--poll=0"]
SLURM = ["scripts/launch_slurm.sh", "--nodes=2", "--gpus-per-node=8", "--time=1:00:00"]

# Keeps the slice's state in a file. What is started on the workers runs here, below $HOME; the
# first PREEMPTED connections to worker 0 break, and the slice is preempted then.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" | tr '\n' ' ' >> "$FAKE/calls"; echo >> "$FAKE/calls"
count() { echo x >> "$FAKE/$1"; wc -l < "$FAKE/$1"; }
for argument in "$@"; do
  [[ $argument == --command=* ]] && command=${argument#--command=}
  [[ $argument == --worker=* ]] && worker=${argument#--worker=}
done
case "$*" in
  *" describe "*) [[ -s $FAKE/state ]] && cat "$FAKE/state" ;;
  *" create "*)
    (($(count creations) > ${NO_ROOM:-0})) || exit 1
    echo READY > "$FAKE/state"
    ;;
  *" delete "*) rm "$FAKE/state" ;;
  *" scp "*) [[ -f $5 ]] ;;
  *"pip install"*)
    mkdir -p "$HOME/vlalign_jax/.venv/bin"
    : > "$HOME/vlalign_jax/.venv/bin/activate"
    ;;
  *" ssh "*)
    if [[ $worker == 0 ]] && (($(count follows) <= ${PREEMPTED:-0})); then
      echo PREEMPTED > "$FAKE/state"
      exit 255
    fi
    cd "$HOME" && bash -c "$command"
    ;;
esac
"""

# Runs the script of a job at once, and again when it is requeued.
SBATCH = r"""#!/usr/bin/env bash
echo "sbatch $*" >> "$FAKE/calls"
cat > "$FAKE/job"
export SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
while :; do
  rm -f "$FAKE/requeued"
  bash "$FAKE/job" >> "$LOG" 2>&1
  code=$?
  [[ -f $FAKE/requeued ]] || exit $code
  ((SLURM_RESTART_COUNT += 1))
done
"""
SRUN = r"""#!/usr/bin/env bash
echo "srun" >> "$FAKE/calls"
shift; "$@"
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "scontrol $*" >> "$FAKE/calls"; : > "$FAKE/requeued"
"""


@pytest.fixture
def launch(tmp_path):
  """`(script and options, script to train with, **environment) -> (exit code, calls, output)`."""
  for name, text in {
    "gcloud": GCLOUD, "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL,
  }.items():  # fmt: skip
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / name).chmod(0o755)
  # A checkout of its own: the Slurm launcher writes its log beside the scripts.
  (tmp_path / "repository" / ".venv" / "bin").mkdir(parents=True)
  (tmp_path / "repository" / ".venv" / "bin" / "activate").touch()
  shutil.copytree(ROOT / "scripts", tmp_path / "repository" / "scripts")
  shutil.copy(ROOT / "requirements.txt", tmp_path / "repository")
  git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path / "repository")]
  for arguments in (["init", "-q"], ["add", "scripts"], ["commit", "-qm", "x"]):
    subprocess.run([*git, *arguments], check=True)

  def launch(command, train="exit 0", **environment):
    (tmp_path / "train.sh").write_text(train)
    (tmp_path / "home").mkdir(exist_ok=True)
    known = {
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      "FAKE": str(tmp_path),
      "HOME": str(tmp_path / "home"),
      "TMPDIR": str(tmp_path),
      "LOG": str(tmp_path / "repository" / "vlalign_jax-7.log"),
    }
    done = subprocess.run(
      ["bash", *command, "--", "bash", str(tmp_path / "train.sh"), "an argument"],
      cwd=tmp_path / "repository",
      env=os.environ | known | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )
    calls = tmp_path / "calls"
    calls = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, calls, done.stdout + done.stderr

  return launch


def _shape(calls) -> list[str]:
  """What each call of gcloud does, in a word; the looks at the state are left out."""
  shapes = []
  for call in calls:
    verb = re.search(r"\b(describe|create|delete|scp|ssh)\b", call)[1]
    if verb == "ssh":
      verb = "follow" if "--worker=0" in call else "install" if "pip install" in call else "start"
    if verb != "describe":
      shapes.append(verb)
  return shapes


def test_tpu_slice_that_is_preempted_once(launch):
  code, calls, output = launch(TPU, "echo training with $1", PREEMPTED="1")
  assert code == 0, output
  whole = ["create", "scp", "install", "start", "follow"]
  assert _shape(calls) == [*whole, "delete", *whole]
  assert "pod is PREEMPTED: deleted and made again" in output
  assert "training with an argument" in output


def test_tpu_slice_that_is_there_is_used(launch, tmp_path):
  (tmp_path / "state").write_text("READY\n")
  code, calls, output = launch([*TPU, "--delete", "--setup=touch ready"])
  assert code == 0, output
  assert _shape(calls) == ["scp", "install", "start", "start", "follow", "delete"]
  assert "--command=touch ready" in next(call for call in calls if "touch" in call)
  assert (tmp_path / "home" / "ready").exists()


def test_error_of_the_training_ends_the_launcher(launch):
  code, calls, output = launch(TPU, "echo error: no such file; exit 3")
  assert code == 3
  assert _shape(calls) == ["create", "scp", "install", "start", "follow"]
  assert "error: no such file" in output


def test_tpu_run_that_was_asked_to_stop_or_was_killed_goes_on(launch):
  train = """
  echo x >> "$FAKE/trained"
  case $(wc -l < "$FAKE/trained") in
    1) echo "SIGTERM: saved at step 3; the same command goes on from there" ;;
    2) kill -9 $$ ;;
    3) kill -9 $PPID $$ ;;
    *) echo finished ;;
  esac
  """
  code, calls, output = launch(TPU, train)
  assert code == 0, output
  assert _shape(calls) == ["create", "scp", "install", *["start", "follow"] * 4]
  assert [f"ended with {n}" in output for n in (143, 137, 254)] == [True] * 3


def test_tpu_slice_for_which_there_is_no_room_at_first(launch):
  code, calls, output = launch([*TPU, "--queued", "--spot"], NO_ROOM="2")
  assert code == 0, output
  assert _shape(calls) == [*["create"] * 3, "scp", "install", "start", "follow"]
  created = next(call for call in calls if "create" in call)
  assert "queued-resources create pod --node-id=pod" in created
  assert created.rstrip().endswith("--spot")


def test_tpu_slice_for_which_there_is_no_room_at_all(launch):
  code, calls, _ = launch([*TPU, "--restarts=1"], NO_ROOM="9")
  assert (code, _shape(calls)) == (1, ["create", "create"])


@pytest.mark.parametrize(
  "options",
  [
    TPU,
    [*TPU, "--queued", "--spot", "--delete", "--project=p", "--setup=mount 'the disk'"],
    SLURM,
    [*SLURM, "--per-gpu", "--setup=module load cuda", "--sbatch=--partition=gpu"],
  ],
)
def test_dry_run_can_be_run_as_printed(launch, options, tmp_path):
  code, calls, output = launch([*options, "--dry-run"])
  assert (code, calls) == (0, [])
  script = tmp_path / "printed.sh"
  script.write_text(output)
  subprocess.run(["bash", "-n", str(script)], check=True)
  assert re.search(r"an\\+ argument", output)
  if options[0] == SLURM[0]:
    return
  known = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
  environment = os.environ | known | {"HOME": str(tmp_path / "home")}
  until_preempted = output.partition("# after a preemption")[0].replace("mount 'the disk'", "true")
  script.write_text(until_preempted)
  done = subprocess.run(
    ["bash", str(script)], cwd=tmp_path / "repository", env=environment, timeout=60
  )
  assert done.returncode == 0
  shape = _shape((tmp_path / "calls").read_text().splitlines())
  assert [step for step in shape if step in ("create", "scp", "install", "follow")] == [
    "create",
    "scp",
    "install",
    "follow",
  ]


def test_slurm_job_saves_and_requeues_itself(launch, tmp_path):
  train = """
  echo x >> "$FAKE/trained"
  case $(wc -l < "$FAKE/trained") in
    1) echo "SIGTERM: saved at step 3; the same command goes on from there" ;;
    2) kill -9 $$ ;;
    *) echo "finished with $1" ;;
  esac
  """
  code, calls, output = launch(SLURM, train)
  assert code == 0, output
  assert [call.split()[0] for call in calls] == [
    "sbatch",
    *["srun", "scontrol"] * 2,
    "srun",
  ]
  for option in ("--nodes=2", "--ntasks-per-node=1", "--signal=TERM@600", "--requeue"):
    assert option in calls[0].split()
  assert "finished with an argument" in (tmp_path / "repository" / "vlalign_jax-7.log").read_text()


def test_slurm_job_that_fails_is_not_repeated(launch):
  code, calls, _ = launch([*SLURM, "--per-gpu"], "exit 1")
  assert (code, [call.split()[0] for call in calls]) == (1, ["sbatch", "srun"])
  assert "--ntasks-per-node=8" in calls[0]


@pytest.mark.parametrize(
  ("command", "expected"),
  [
    (TPU[:2], "--name, --zone and --type are needed"),
    ([*TPU, "--spott"], "unknown option --spott"),
    ([*TPU, "--restarts=x"], "--restarts=x is not a number"),
    (SLURM[:2], "--nodes, --gpus-per-node and --time are needed"),
  ],
)
def test_bad_options(launch, command, expected):
  code, calls, output = launch(command)
  assert (code, calls) == (2, [])
  assert expected in output


def test_help_is_the_beginning_of_the_script():
  for script in (TPU[0], SLURM[0]):
    done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("Trains on ")
    assert "--dry-run" in done.stdout
    assert "set -" not in done.stdout
