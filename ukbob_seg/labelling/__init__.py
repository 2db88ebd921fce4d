"""Labelling a cohort with a trained model: a raw dataset of images and predicted labels, ready for the label filter."""
