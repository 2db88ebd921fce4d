"""ukbob_demo: the main job end to end on synthetic data."""

from __future__ import annotations

from pathlib import Path

from ukbob_seg.cli.common import choose_device, command, make_parser


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_demo",
        "Make a synthetic neck-to-thigh Dixon MRI cohort with planted label faults, then plan, filter, train, predict "
        "with and without ETTA, evaluate and report. Needs no data and no GPU; some minutes on two CPU cores.",
        "  ukbob_demo\n  ukbob_demo -o my_demo --train-cases 40 --steps 60",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("ukbob_demo"), help="folder (default: ./ukbob_demo)")
    parser.add_argument("--train-cases", type=int, metavar="N", help="synthetic training cases (default: 100)")
    parser.add_argument("--test-cases", type=int, metavar="N", help="synthetic test cases (default: 6)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: 260)")
    parser.add_argument("--fault-fraction", type=float, metavar="F", help="share of labels to spoil (default: 0.02)")
    parser.add_argument("--shift", type=float, metavar="S", help="strangeness of the test scanner (default: 0.5)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    arguments = parser.parse_args(argv)

    from ukbob_seg.demo.run import DemoConfig, run_demo

    given = {
        "train_cases": arguments.train_cases,
        "test_cases": arguments.test_cases,
        "steps": arguments.steps,
        "fault_fraction": arguments.fault_fraction,
        "test_shift": arguments.shift,
        "seed": arguments.seed,
    }
    config = DemoConfig(
        device=choose_device(arguments.device), **{key: value for key, value in given.items() if value is not None}
    )
    result = run_demo(arguments.output, config)
    plain, adapted = result.plain.overall("dice").mean, result.adapted.overall("dice").mean
    filtered = result.filtered
    print(f"Dice without ETTA   {plain:.3f}")
    print(f"Dice with ETTA      {adapted:.3f}")
    print(
        f"label faults        {filtered.planted} planted, {filtered.found} found, {filtered.false_alarms} false alarms"
    )
    print(f"time                {sum(result.seconds.values()) / 60:.1f} min")
    print(f"report              {result.report}")


if __name__ == "__main__":
    raise SystemExit(main(None))
