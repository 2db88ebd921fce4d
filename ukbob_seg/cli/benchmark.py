"""ukbob_benchmark: the way of a challenge, step by step; every step is a module of its own beside this one."""

from __future__ import annotations

from ukbob_seg.cli.common import command
from ukbob_seg.cli.subcommands import run_subcommand

EXAMPLE = "  ukbob_benchmark table btcv scores/summary.json"
SUBCOMMANDS = {
    "convert": ("ukbob_seg.cli.benchmark_convert", "a challenge's official folder into a raw dataset"),
    "score": ("ukbob_seg.cli.benchmark_score", "zero-shot: score on the organs that two sets of classes share"),
    "package": ("ukbob_seg.cli.benchmark_package", "predictions into the archive that the organisers expect"),
    "validate": ("ukbob_seg.cli.benchmark_validate", "check such an archive against the challenge's rules"),
    "robustness": (
        "ukbob_seg.cli.benchmark_robustness",
        "a trained model on shifted images, with and without adaptation",
    ),
    "table": ("ukbob_seg.cli.benchmark_table", "your scores beside the paper's figures"),
    "networks": ("ukbob_seg.cli.benchmark_networks", "several networks under one budget, as in the paper's tables"),
    "scaling": ("ukbob_seg.cli.benchmark_scaling", "Dice against the number of training cases"),
    "embeddings": ("ukbob_seg.cli.benchmark_embeddings", "t-SNE of a model's features, averaged over each class"),
}


@command
def main(argv: list[str] | None = None) -> None:
    """Find the subcommand, parse its arguments, run it."""
    run_subcommand(
        "ukbob_benchmark", argv, SUBCOMMANDS, "Take part in public challenges, and compare with the paper.", EXAMPLE
    )


if __name__ == "__main__":
    raise SystemExit(main(None))
