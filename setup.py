"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "ukbob_seg/__init__.py").read_text(encoding="utf-8"))[1]
COMMANDS = (
    "plan_and_preprocess",
    "extract_fingerprint",
    "plan",
    "preprocess",
    "filter",
    "train",
    "predict",
    "label",
    "ensemble",
    "evaluate",
    "find_postprocessing",
    "find_best",
    "export_model",
    "import_model",
    "benchmark",
    "convert",
    "demo",
)

setup(
    name="ukbob_seg",
    version=VERSION,
    description="Self-configuring 3D medical image segmentation with label filtering and test-time adaptation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ukbob_seg", "ukbob_seg.*"]),
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "SimpleITK>=2.3",
        "nibabel>=5",
        'isal>=1.5; platform_machine in "x86_64 AMD64 aarch64 arm64"',
        "scipy>=1.11",
        "scikit-image>=0.22",
        "tqdm",
        "numba>=0.60",
        "blosc2>=2.7",
        "joblib>=1.3",
        "pandas>=2.1",
        "pyarrow>=14",
        "matplotlib>=3.8",
        "safetensors>=0.4",
    ],
    extras_require={
        "dicom": ["pydicom>=3", "highdicom>=0.25"],
        "dask": ["dask>=2024.1", "distributed>=2024.1"],
        "tensorboard": ["tensorboard>=2.14"],
        "tsne": ["scikit-learn>=1.3"],
        "nnunet": ["dynamic-network-architectures>=0.4"],
        "baselines": ["monai>=1.5", "einops"],
        "onnx": ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.19"],
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "monai>=1.5",
            "einops",
            "scikit-learn",
            "psutil",
            "tensorboard>=2.14",
            "dask>=2024.1",
            "distributed>=2024.1",
            "onnx>=1.16",
            "onnxscript>=0.3",
            "onnxruntime>=1.19",
            "pydicom>=3",
            "highdicom>=0.25",
        ],
        "dev": ["ruff>=0.6", "mypy>=1.10", "pre-commit"],
    },
    entry_points={
        "console_scripts": [f"ukbob_{name} = ukbob_seg.cli.{name}:main" for name in COMMANDS],
    },
)
