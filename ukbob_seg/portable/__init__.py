"""Trained models as one file: exported, checked and imported, and their networks for ONNX and MONAI."""
