"""Fingerprint, planner, plans, cropping, normalization, resampling, storage."""
