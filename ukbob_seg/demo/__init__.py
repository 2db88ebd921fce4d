"""A synthetic Dixon cohort with known truth and planted label faults."""
