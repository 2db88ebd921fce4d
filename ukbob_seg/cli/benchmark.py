"""ukbob_benchmark: the way of a challenge, step by step; every step is a module of its own beside this one."""

from __future__ import annotations

import sys
from importlib import import_module

from ukbob_seg.cli.common import command, make_parser

# A subcommand's module has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(arguments). Only the one that is called
# is imported.
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
    "scaling": ("ukbob_seg.cli.benchmark_scaling", "Dice against the number of training cases"),
    "embeddings": ("ukbob_seg.cli.benchmark_embeddings", "t-SNE of a model's features, averaged over each class"),
}


@command
def main(argv: list[str] | None = None) -> None:
    """Find the subcommand, parse its arguments, run it."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in SUBCOMMANDS:
        parser = make_parser("ukbob_benchmark", _description(), "  ukbob_benchmark table btcv scores/summary.json")
        parser.add_argument("subcommand", choices=SUBCOMMANDS, metavar="SUBCOMMAND", help="one of the above")
        parser.parse_args(given)  # help, version, or an error: no subcommand comes first
        parser.error("the subcommand must come first")
    module = import_module(SUBCOMMANDS[given[0]][0])
    parser = make_parser(f"ukbob_benchmark {given[0]}", module.DESCRIPTION, module.EXAMPLE)
    module.add_arguments(parser)
    module.run(parser.parse_args(given[1:]))


def _description() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, (_, help_text) in SUBCOMMANDS.items()]
    return (
        "Take part in public challenges, and compare with the paper. Subcommands, each with its own --help:\n"
        + "\n".join(lines)
    )


if __name__ == "__main__":
    raise SystemExit(main(None))
