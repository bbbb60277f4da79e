"""The machine: which device, in which precision, compiled or not.

`auto` is decided by rules, as a pure function of the hardware and the configuration: the same
machine and the same config always give the same engine, and a line says why.
"""

import importlib.util
import os
import re
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """What the rules look at."""

    cuda: bool = False  # an NVIDIA (or ROCm) GPU that PyTorch can use
    cuda_bf16: bool = False  # with bfloat16 arithmetic
    cuda_name: str = ""
    cuda_count: int = 1
    mps: bool = False  # an Apple GPU
    cpu_bf16: bool = False  # a CPU with instructions for bfloat16: AMX or AVX-512
    compiler: bool = False  # a C++ compiler and Python's headers, which torch.compile needs
    triton: bool = False  # which torch.compile needs on a GPU
    threads: int = 1


def find_hardware() -> Hardware:
    """Look at this machine."""
    cuda = torch.cuda.is_available()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return Hardware(
        cuda=cuda,
        cuda_bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        cuda_name=torch.cuda.get_device_name() if cuda else "",
        cuda_count=torch.cuda.device_count(),
        mps=torch.backends.mps.is_available(),
        cpu_bf16=any(capabilities.get(f"{kind}_bf16", False) for kind in ("amx", "avx512")),
        compiler=any(map(shutil.which, compilers)) and headers.exists(),
        triton=importlib.util.find_spec("triton") is not None,
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True)
class Engine:
    """Where and how the model runs, and why so: one short reason for each choice."""

    device: str
    dtype: str
    compile: bool
    reasons: tuple[str, str, str] = ("", "", "")

    def choices(self) -> dict:
        """What was chosen, without the reasons."""
        return {"device": self.device, "dtype": self.dtype, "compile": self.compile}

    @property
    def device_type(self) -> str:
        return self.device.split(":")[0]

    def autocast(self) -> AbstractContextManager:
        """The block in which matrix products run in the engine's precision."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.dtype])

    def move(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as tensors on the device; to a GPU from pinned memory, without waiting."""
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        gpu = self.device_type == "cuda"
        if gpu:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return {name: t.to(self.device, non_blocking=gpu) for name, t in tensors.items()}


CPU = Engine("cpu", "float32", compile=False)


def choose_engine(
    hardware: Hardware,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool | str = "auto",
    flops: float = 0.0,
    many_shapes: bool = False,
) -> Engine:
    """The engine for a run of flops operations in all; what is not auto is taken as given.

    many_shapes: whether its batches differ in the length of two texts, a source and its answer.

    Raises ValueError for a device, precision or compilation that the machine does not have.
    """
    device, device_reason = choose_device(hardware, device)
    kind = device.split(":")[0]
    dtype, dtype_reason = choose_dtype(hardware, kind, dtype)
    compile, compile_reason = choose_compile(hardware, kind, dtype, compile, flops, many_shapes)
    return Engine(device, dtype, compile, (device_reason, dtype_reason, compile_reason))


def choose_device(hardware: Hardware, device: str) -> tuple[str, str]:
    """The device and why; see choose_engine."""
    if device == "auto":
        if hardware.cuda:
            return "cuda", hardware.cuda_name
        if hardware.mps:
            return "mps", "an Apple GPU"
        return "cpu", f"{hardware.threads} threads; PyTorch sees no GPU here"
    kind, _, index = device.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", device):
        raise ValueError(f"device={device!r}: choose auto, cpu, cuda, cuda:N or mps")
    missing = {"cuda": not hardware.cuda, "mps": not hardware.mps}
    if missing.get(kind) or int(index or 0) >= max(1, hardware.cuda_count):
        raise ValueError(f"device={device!r}: PyTorch sees no such device here; use --device=auto")
    return device, "as asked"


def choose_dtype(hardware: Hardware, kind: str, dtype: str) -> tuple[str, str]:
    """The precision of matrix products and why; weights and optimizer stay float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose auto, {', '.join(DTYPES)}")
        return dtype, "as asked"
    if kind == "cuda" and hardware.cuda_bf16:
        return "bfloat16", "the GPU has bfloat16 arithmetic"
    if kind == "cuda":
        return "float16", "the GPU has no bfloat16 arithmetic; losses are scaled"
    if kind == "cpu" and hardware.cpu_bf16:
        return "bfloat16", "the CPU has instructions for it"
    return "float32", "no fast bfloat16 on this device"


# Compiling takes 20 to 80 s on two CPU cores. From so many floating point operations on, a run
# earns that back twice (benchmarks/train.py prints how many do it once). It saves least in
# float32, where nearly all time is that of matrix products, which stay as they are; more in
# bfloat16, since it fuses the casts. That of GPUs is an estimate: some ten seconds of their work.
COMPILE_FROM_FLOPS = {"float32": 2e14, "bfloat16": 5e13, "float16": 2e14, "cuda": 1e15}


def choose_compile(
    hardware: Hardware,
    kind: str,
    dtype: str,
    compile: bool | str,
    flops: float,
    many_shapes: bool = False,
) -> tuple[bool, str]:
    """Whether to run through torch.compile, and why."""
    able = hardware.compiler and (kind != "cuda" or hardware.triton)
    if isinstance(compile, bool):
        if compile and not able:
            raise ValueError(
                "compile=True: needs a C++ compiler, Python's headers and, for a GPU, "
                "triton, and not all are here; use --compile=auto"
            )
        return compile, "as asked"
    if compile != "auto":
        raise ValueError(f"compile={compile!r}: choose auto, True or False")
    if not able:
        return False, "no C++ compiler, Python headers or triton here"
    if kind == "mps":
        return False, "torch.compile is young on Apple GPUs"
    if kind == "cpu" and many_shapes:
        return False, "on a CPU, batches of many shapes are faster so"
    if flops < COMPILE_FROM_FLOPS["cuda" if kind == "cuda" else dtype]:
        return False, "the run is too short to earn the compilation back"
    return True, "the run is long enough; the first steps take up to a minute, they compile"
