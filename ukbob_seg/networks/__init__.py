"""Swin-UNETR, the registry of networks, and weight import."""
