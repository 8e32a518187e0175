"""Prediction: answers to records, or their log-probabilities or scores, written line by line."""
