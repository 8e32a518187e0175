"""reward.html: a reward model's accuracy, calibration, scores and worst mistakes."""

from vlalign_jax import html
from vlalign_jax.data.records import Record
from vlalign_jax.prediction import plots

_HEAD = ("", "pairs", "accuracy", "standard error", "ties", "loss", "margin")
_NAMES = ("pairs", "accuracy", "accuracy_error", "ties", "loss", "margin")


def page(
  config,
  numbers: dict,
  pairs: list[tuple[dict, dict]],
  records: tuple[Record, ...],
  shown: int,
) -> str:
  """Returns the page of an evaluation.

  Args:
    config: of the prediction.
    numbers: from `reward_accuracy.evaluate`.
    pairs: (better, worse) lines that it evaluated.
    records: the records of the lines.
    shown: how many of the most wrong pairs to show.
  """
  groups = [("all", numbers)]
  groups += [(f"of {size} answers", group) for size, group in numbers["by_answers"].items()]
  groups += [(f"{ranks} ranks apart", group) for ranks, group in numbers["by_distance"].items()]
  calibration = numbers["calibration"]
  better, worse = ([pair[side]["reward"] for pair in pairs] for side in (0, 1))
  bins = [
    (f"{one['low']:.3g} to {one['high']:.3g}", one["pairs"], one["predicted"], one["observed"])
    for one in calibration["bins"]
  ]
  body = [
    html.table(
      ("", ""),
      [
        ("model", config.model.init_from),
        ("data", config.data.eval),
        *((name, numbers[name]) for name in ("records", "answers", "left_out") if name in numbers),
        ("best answer first", numbers["best_first"]),
        ("accuracy, mean of records", numbers["record_accuracy"]),
        ("mean score", numbers["score_mean"]),
        ("standard deviation of scores", numbers["score_deviation"]),
      ],
    ),
    "<h2>Accuracy of pairs</h2>",
    html.table(_HEAD, [(name, *(group[key] for key in _NAMES)) for name, group in groups]),
    "<h2>Scores</h2>",
    plots.histogram({"better of a pair": better, "worse of a pair": worse}),
    "<h2>Calibration</h2>",
    "<p>The predicted probability that the answer with the higher score is the better one, and the "
    f"observed share. Expected calibration error: {calibration['error']:.4f}.</p>",
    plots.calibration(calibration["bins"]),
    html.table(("predicted", "pairs", "mean predicted", "observed"), bins),
  ]
  wrong = sorted(
    (pair for pair in pairs if pair[0]["reward"] <= pair[1]["reward"]),
    key=lambda pair: pair[0]["reward"] - pair[1]["reward"],
  )
  body.append(f"<h2>The most wrong pairs ({min(shown, len(wrong))} of {len(wrong)})</h2>")
  body += [_pair(config, records[pair[0]["record"]], pair) for pair in wrong[:shown]]
  return html.page("Reward model", body)


def _pair(config, record: Record, pair: tuple[dict, dict]) -> str:
  rows = [(f"rank {line['rank'] + 1}", line["answer"], line["reward"]) for line in pair]
  return (
    f"<section>{html.pictures(record.image_files)}<div>"
    f'<p class="label">{html.text(record.where)}</p><p>{html.text(pair[0]["prompt"])}</p>'
    f"{html.table(('', 'answer', 'score'), rows)}</div></section>"
  )
