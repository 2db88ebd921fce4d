"""Commands that consist of subcommands, each a module of its own, of which only the one that is called is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module

from ukbob_seg.cli.common import make_parser

Subcommands = Mapping[str, tuple[str, str]]


def run_subcommand(name: str, argv: list[str] | None, subcommands: Subcommands, purpose: str, example: str) -> None:
    """Find the subcommand, parse its arguments, run it.

    Args:
        name: of the command.
        argv: its arguments; None for those of the process.
        subcommands: name -> module and what it is for. A module has ``DESCRIPTION``, ``EXAMPLE``,
            ``add_arguments(parser)`` and ``run(arguments)``.
        purpose: what the command is for, a sentence.
        example: for its help.
    """
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in subcommands:
        width = max(map(len, subcommands))
        lines = [f"  {one:<{width}}  {help_text}" for one, (_, help_text) in subcommands.items()]
        description = f"{purpose} Subcommands, each with its own --help:\n" + "\n".join(lines)
        parser = make_parser(name, description, example)
        parser.add_argument("subcommand", choices=subcommands, metavar="SUBCOMMAND", help="one of the above")
        parser.parse_args(given)  # help, version, or an error: no subcommand comes first
        parser.error("the subcommand must come first")
    module = import_module(subcommands[given[0]][0])
    parser = make_parser(f"{name} {given[0]}", module.DESCRIPTION, module.EXAMPLE)
    module.add_arguments(parser)
    module.run(parser.parse_args(given[1:]))
