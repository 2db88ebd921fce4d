"""Python's collector in processes that are one command."""

import subprocess
import sys

CODE = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # the first registered is called last
from ukbob_seg.cli.common import command
command(lambda argv: print(gc.isenabled(), *gc.get_threshold()))([])
"""


def test_a_command_collects_seldom_and_leaves_what_remains_to_the_system():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    collecting, frozen = done.stdout.split("\n")[:2]
    usual = subprocess.run(
        [sys.executable, "-c", "import gc; print(*gc.get_threshold())"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert collecting.split() == ["True", "5000", *usual[1:]]
    assert frozen == "True"
