"""The challenges, by the name on the command line."""

from __future__ import annotations

from ukbob_seg.benchmark.amos import AMOS
from ukbob_seg.benchmark.brats import BRATS
from ukbob_seg.benchmark.btcv import BTCV
from ukbob_seg.benchmark.protocol import Protocol, SubmissionRules
from ukbob_seg.benchmark.ukbob72 import UKBOB72
from ukbob_seg.errors import ConfigError

PROTOCOLS = {"btcv": BTCV, "amos": AMOS, "brats": BRATS, "ukbob72": UKBOB72}


def find_protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ConfigError: no such protocol; lists them.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"no protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def submission_rules(name: str) -> SubmissionRules:
    """What a challenge wants back.

    Raises:
        ConfigError: no such protocol, or one without submissions.
    """
    rules = find_protocol(name).submission
    if rules is None:
        raise ConfigError(f"{name} has no submissions; choose from {', '.join(SUBMITTED)}")
    return rules


SUBMITTED = tuple(name for name, protocol in PROTOCOLS.items() if protocol.submission is not None)
