"""``comtip doctor``: show which optional features work on this machine."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options; the command has none."""


def run(args: argparse.Namespace) -> int:
    """Print the state of each optional feature; return 1 if an installed one is broken."""
    from comtip_fast.doctor import examine, render

    findings = examine()
    print(render(findings))
    return 1 if any(f.state == "broken" for f in findings) else 0
