"""Lists the evaluation metrics that checkpoints can be ranked by."""

# Metric -> whether a higher value is better.
HIGHER_IS_BETTER = {
  "eval/loss": False,
  "eval/perplexity": False,
  "eval/token_accuracy": True,
  "eval/exact_match": True,
  "eval/accuracy": True,
  "eval/margin": True,
  "eval/rewards/accuracies": True,
  "eval/rewards/margins": True,
  "eval/logps/accuracies": True,
  "eval/objective/scores": True,
  "eval/objective/rlhf_reward": True,
}
# Stage -> those that it reports.
METRICS = {
  "sft": ("eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/exact_match"),
  "reward": ("eval/loss", "eval/accuracy", "eval/margin"),
  "dpo": (
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/logps/accuracies",
  ),
  "ppo": ("eval/objective/scores", "eval/objective/rlhf_reward"),
}
