"""The metrics of evaluation that checkpoints can be ranked by."""

# Metric -> whether more of it is better.
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
