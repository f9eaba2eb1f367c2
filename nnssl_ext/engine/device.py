"""Devices: which one a name means, the number formats it gets, and reproducible or fast kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from nnssl_ext.engine.distributed import World
from nnssl_ext.models.norms import ChannelsLastNorms

Precision = Literal["auto", "bf16", "fp16", "fp32"]
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, world: World | None = None) -> torch.device:
    """The torch device of a name; in a world of several processes each takes the GPU of its local rank.

    Raises:
        ValueError: Where the device is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Device {name!r} is unknown: use cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"Device {name!r} is not available: torch sees no CUDA GPU. Use -device cpu.")
    index = world.local_rank if world and world.size > 1 else device.index or 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"GPU {index} is not there: this machine has {torch.cuda.device_count()}.")
    return torch.device("cuda", index)


@contextmanager
def kernels(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Choose between the fastest kernels and reproducible ones for the length of a block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def resolve_precision(wanted: Precision, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """The format to use on a device.

    `auto` is bf16 on a GPU that has it and fp16 with loss scaling on one that has not. On a CPU it is fp32 even
    where the processor computes in bf16 (which takes about half the time): what runs there are demonstrations, tests
    and small studies, whose numbers should not depend on the machine's generation.

    Raises:
        ValueError: For fp16 on a CPU, or an unknown name.
    """
    if wanted not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"Precision {wanted!r} is unknown: use auto, bf16, fp16 or fp32.")
    if device.type != "cuda":
        if wanted == "fp16":
            raise ValueError(f"Precision fp16 needs a CUDA device, and this one is {device}: use fp32, bf16 or auto.")
        return "fp32" if wanted == "auto" else wanted
    if wanted != "auto":
        return wanted
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16, as far as Linux tells."""
    if not CPU_INFO.is_file():
        return False
    return not BF16_FLAGS.isdisjoint(CPU_INFO.read_text(encoding="utf-8", errors="replace").split())


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a forward pass in a resolved precision."""
    if precision == "fp32":
        yield
        return
    norms = ChannelsLastNorms() if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=_DTYPES[precision]), norms:
        yield


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler that scales for fp16 and passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
