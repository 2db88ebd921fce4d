"""The baselines that no well-kept library has, each from its paper."""
