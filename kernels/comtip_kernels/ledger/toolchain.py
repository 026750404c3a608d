"""Other releases of Triton: installed in a cache folder of their own, and used by the ledger in a subprocess.

PyTorch brings the installed release. The ledger also holds rows of the oldest and the newest supported release, which are
compiled with ``python -m comtip_kernels.ledger --triton 3.6`` (or ``3.9``) and checked by ``make rehearsal-grid``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comtip_kernels.dispatch import BLACKWELL_NEEDS, release_of

OLDEST, NEWEST = "3.6", "3.9"
"""Supported releases. PyTorch 2.10, the oldest that the packages allow, requires Triton 3.6.0."""
ARCHITECTURES = (80, 90, 100)
KERNELS = Path(__file__).parents[2]
"""The folder that contains the package ``comtip_kernels``."""


def architectures(version: str) -> tuple[int, ...]:
    """Return the architectures for which a release of Triton compiles every kernel.

    The compilers of Triton 3.6 and 3.7 end with an error inside one of their passes when they compile the level loss for sm_100.
    """
    return ARCHITECTURES if release_of(version) >= BLACKWELL_NEEDS else tuple(a for a in ARCHITECTURES if a < 100)


def cache_folder() -> Path:
    """Return the folder that holds the releases, ``comtip-fast/triton`` in ``$XDG_CACHE_HOME`` (default ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comtip-fast" / "triton"


def installed(release: str, folder: Path | None = None) -> Path:
    """Return a folder for ``PYTHONPATH`` that contains a release of Triton; pip downloads it on the first call.

    Parameters
    ----------
    release
        ``3.6`` for its newest patch release, or a full version such as ``3.6.0``.
    folder
        Where releases are kept (default: :func:`cache_folder`).

    Raises
    ------
    ValueError
        If ``release`` is not a version.
    RuntimeError
        If pip cannot install it.
    """
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", release):
        raise ValueError(f"Triton release {release!r} is not a version; give e.g. {OLDEST} or {OLDEST}.0")
    target = (folder or cache_folder()) / release
    if not version_in(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A download that was interrupted leaves nothing under the final name.
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            wanted = f"triton=={release}" + (".*" if release.count(".") == 1 else "")
            words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*words, "--target", temporary, wanted], capture_output=True, text=True, check=False)
            if done.returncode or not version_in(Path(temporary)):
                raise RuntimeError(
                    f"pip could not install {wanted} into {target}: {done.stderr.strip()[-500:]}; check the network, or install it there"
                )
            shutil.rmtree(target, ignore_errors=True)
            Path(temporary).rename(target)
            Path(temporary).mkdir()  # for the context manager to remove
    return target


def version_in(folder: Path) -> str:
    """Return the version of Triton in a folder; empty if there is none."""
    found = sorted(folder.glob("triton-*.dist-info"))
    return found[0].name.split("-")[1].removesuffix(".dist") if found else ""


def run_ledger(release: str, arguments: Sequence[str], folder: Path | None = None) -> int:
    """Run ``python -m comtip_kernels.ledger`` on a release of Triton and return its exit status.

    Parameters
    ----------
    release
        As in :func:`installed`.
    arguments
        Arguments of the ledger, without ``--triton``.
    folder
        Where releases are kept (default: :func:`cache_folder`).

    Raises
    ------
    ValueError, RuntimeError
        As in :func:`installed`.
    """
    paths = [str(installed(release, folder)), str(KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-m", "comtip_kernels.ledger", *arguments]
    return subprocess.run(words, env=env, check=False).returncode
