"""``--gather DIR``: download the wheels for the optional comparisons, for a GPU machine without network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 64 * 2**20
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux_2_{n}_x86_64" for n in (28, 27, 17, 12, 5)) + ("manylinux2014_x86_64",)
WHEELS = {
    "pydantic": "checks of the config; without it a replacement builds configs without checks",
    "pydantic-core": "needed by pydantic",
    "typing-inspection": "needed by pydantic",
    "annotated-types": "needed by pydantic",
    "tokenizers": "the project's tokenizer, which every part with the model needs",
    "liger-kernel": "Liger's fused linear cross entropy",
    "open-clip-torch": "open_clip's ClipLoss",
    "ftfy": "needed by open_clip",
    "wcwidth": "needed by ftfy",
    "hjson": "needed by DeepSpeed",
    "msgpack": "needed by DeepSpeed",
    "einops": "needed by DeepSpeed",
}
BUILT = {"deepspeed>=0.19,<0.20": "ZeRO; published as source, built here without extensions"}
"""{source package from which a wheel for any platform is built: its use}."""
TOO_LARGE = {
    "nvidia-dali-cuda130": "DALI's decoder",
    "flash-attn": "flash-attn 2 has no wheel on PyPI",
}


def gather(folder: Path) -> int:
    """Download all wheels to ``folder``, print their sizes, and return the exit status.

    A wheel that cannot be downloaded is reported; its comparison will be skipped. The status is 1 if the wheels together
    exceed :data:`LIMIT` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in WHEELS if _pip(download_command(pinned(name, folder), folder))]
    failed += [name for name in BUILT if _pip(build_command(name, folder), DS_BUILD_OPS="0")]
    files = sorted(folder.glob("*.whl"))
    total = sum(f.stat().st_size for f in files)
    for file in files:
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    print(f"{total / 2**20:8.2f} MiB of at most {LIMIT / 2**20:.0f} MiB in {folder}")
    for name in failed:
        print(f"not downloaded, its comparison will be skipped: {name} ({(WHEELS | BUILT)[name]})")
    for name, what in TOO_LARGE.items():
        print(f"not included: {name} ({what})")
    print(
        f"on the machine with the GPU, run: python -m pip install --no-index --no-deps --target site {folder}/*.whl && "
        "PYTHONPATH=site python bench/gpu_evidence.py"
    )
    return int(total > LIMIT)


def download_command(requirement: str, folder: Path) -> list[str]:
    """Return the arguments for pip to download one wheel for the machine with the GPU."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    return ["download", "--no-deps", *target, "-d", str(folder), requirement]


def build_command(requirement: str, folder: Path) -> list[str]:
    """Return the arguments for pip to build a wheel from source with the packages of this environment."""
    return ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), requirement]


def pinned(name: str, folder: Path) -> str:
    """Return the requirement for a package; pydantic-core must have the version that the downloaded pydantic requires."""
    if name != "pydantic-core":
        return name
    for wheel in folder.glob("pydantic-[0-9]*.whl"):
        found = core_requirement(wheel)
        if found:
            return found
    return name


def core_requirement(wheel: Path) -> str:
    """Return the requirement ``pydantic-core==...`` in the metadata of a pydantic wheel, "" if there is none."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: pydantic-core")]
    return found[0].replace(" ", "") if found else ""


def _pip(arguments: list[str], **variables: str) -> int:
    import os

    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    return subprocess.run(command, check=False, env=os.environ | variables).returncode
