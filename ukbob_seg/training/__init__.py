"""Splits, patch sampling, augmentation, losses, schedules, the training loop, checkpoints."""
