"""SOLF and the filters it is compared with: which organ labels can be trusted."""
