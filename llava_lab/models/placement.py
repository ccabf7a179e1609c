"""Where a model runs and in which precision, decided once, with the reason in words.

Maps compare small differences, so a small model runs in float32; a large one takes half the memory
in a 16-bit type, which every large checkpoint was made for. Nothing here changes torch's settings.

    where = choose_device(None, None, parameters=7_000_000_000)
    where.device, where.dtype
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llava_lab.errors import OptionError

LARGE = 1_000_000_000  # parameters; above it float32 no longer fits ordinary machines
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}  # what others write


class Placement(NamedTuple):
    """A device, a dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    why: str


def choose_device(
    device: str | int | torch.device | None = None, dtype: str | torch.dtype | None = None, *, parameters: int | None = None
) -> Placement:
    """Decide for a model of so many parameters (None: a small one); what the user gives is taken, after a check.

    >>> from llava_lab.models import choose_device
    >>> choose_device("cpu", parameters=5_000_000).why.split(";")[0]
    'cpu: as asked'
    """
    place, why_device = _device(device)
    dtype = None if isinstance(dtype, str) and dtype == "auto" else dtype
    number, why_dtype = _given(dtype) if dtype is not None else _dtype(place, parameters)
    return Placement(place, number, f"{why_device}; {why_dtype}")


def _device(device: str | int | torch.device | None) -> tuple[torch.device, str]:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda"), "cuda: a GPU is here"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "mps: Apple's GPU is here"
        return torch.device("cpu"), "cpu: no GPU is here"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"device must be None, 'cpu', 'cuda', 'cuda:0' or 'mps', got {device!r}") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(place.type, False) or (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()):
        usable = ", ".join(name for name, usable in there.items() if usable)
        raise OptionError(f"device {str(device)!r} is not on this machine; usable: {usable}")
    return place, f"{place}: as asked"


def _given(dtype: str | torch.dtype) -> tuple[torch.dtype, str]:
    plain = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    number = DTYPES.get(SHORT.get(plain, plain)) if isinstance(dtype, str) else dtype
    if not isinstance(number, torch.dtype) or number not in DTYPES.values():
        raise OptionError(f"dtype must be None or one of {', '.join(DTYPES)}, got {dtype!r}")
    return number, f"{_name(number)}: as asked"


def _dtype(device: torch.device, parameters: int | None) -> tuple[torch.dtype, str]:
    size = f"up to {LARGE / 1e6:,.0f}M parameters" if parameters is None else f"{parameters / 1e6:,.1f}M parameters"
    if parameters is None or parameters <= LARGE:
        return torch.float32, f"float32: {size} fit easily, and maps compare small differences"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, f"bfloat16: {size} in half the memory, with float32's range"
        return torch.float16, f"float16: {size} in half the memory; this GPU has no bfloat16"
    if device.type == "mps":
        return torch.float16, f"float16: {size} in half the memory"
    if _cpu_has_bfloat16():
        return torch.bfloat16, f"bfloat16: {size} in half the memory, and this CPU has instructions for it"
    return torch.bfloat16, f"bfloat16: {size} in half the memory; this CPU emulates it, so it is slow"


def _cpu_has_bfloat16() -> bool:
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
    return bool(check and check())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
