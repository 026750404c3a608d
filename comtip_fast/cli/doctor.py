"""``comtip doctor``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Print what this machine can run; exit 1 if something installed is broken."""
    from comtip_fast.doctor import examine, render

    findings = examine()
    print(render(findings))
    return 1 if any(f.state == "broken" for f in findings) else 0
