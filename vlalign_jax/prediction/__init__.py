"""Prediction: answers, log-probabilities and scores of records, written down as they come."""
