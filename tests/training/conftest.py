"""A tiny dataset, and networks that train on it in seconds."""

import json

import pytest

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions

NETWORKS = '''
import time
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, in_channels, out_channels, width, dropout=0.2):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True),
                         nn.ReLU(), nn.Dropout(dropout), nn.Conv3d(width, out_channels, 1))

class Plain(Tiny):
    """Without dropout, whose masks depend on the number of processes."""
    def __init__(self, in_channels, out_channels, width):
        super().__init__(in_channels, out_channels, width, 0.0)

class Slow(Tiny):
    """Takes long enough to be interrupted within an epoch."""
    def forward(self, image):
        time.sleep(0.04 if self.training else 0)
        return super().forward(image)
'''


@pytest.fixture
def roots(make_dataset, tmp_path, monkeypatch):
    """A tiny preprocessed dataset, planned for the networks above."""
    make_dataset(cases=5)
    plan_and_preprocess(7, Roots.below(tmp_path), PlanOptions(memory_gb=2, batch_size=2, feature_size=12), workers=1)
    path = tmp_path / "preprocessed" / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    networks = content["configurations"]["3d_fullres"]["networks"]
    for name, batch_size in (("Tiny", 2), ("Plain", 4), ("Slow", 2)):
        networks[f"tests_tiny:{name}"] = {
            "patch_size": [16, 16, 16], "batch_size": batch_size, "arguments": {"width": 4},
            "estimated_memory_gb": 0.1,
        }  # fmt: skip
    path.write_text(json.dumps(content))
    (tmp_path / "tests_tiny.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    return Roots.below(tmp_path)
