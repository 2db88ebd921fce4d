"""The raw-folder contract: paths, dataset.json, label scheme, image I/O, integrity checks."""
