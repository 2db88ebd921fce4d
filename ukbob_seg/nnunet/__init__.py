"""Models that nnU-Net v2 trained: their files, plans, weights and preprocessing, in terms of this package."""
