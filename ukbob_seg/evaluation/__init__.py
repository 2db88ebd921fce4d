"""Metrics, summary tables, report, validation of a fold."""
