"""Sliding window, test-time adaptation, export, the predictor."""
