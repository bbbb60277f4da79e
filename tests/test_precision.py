"""The rules by which auto chooses, on machines of every kind."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanolm.precision import DTYPES, Engine, Hardware, choose_engine, find_hardware

LAPTOP = Hardware(threads=2, compiler=True)
AMX = replace(LAPTOP, cpu_bf16=True)
GPU = replace(
    LAPTOP, cuda=True, cuda_bf16=True, cuda_name="NVIDIA H100 80GB HBM3", cuda_count=2, triton=True
)
OLD_GPU = replace(GPU, cuda_bf16=False)
APPLE = replace(LAPTOP, mps=True)
LONG, SHORT = 1e18, 1e6


@pytest.mark.parametrize(
    ("hardware", "device", "dtype", "compile"),
    [
        (LAPTOP, "cpu", "float32", True),
        (AMX, "cpu", "bfloat16", True),
        (GPU, "cuda", "bfloat16", True),
        (OLD_GPU, "cuda", "float16", True),
        (APPLE, "mps", "float32", False),
        (replace(LAPTOP, compiler=False), "cpu", "float32", False),
        (replace(GPU, compiler=False), "cuda", "bfloat16", False),
        (replace(GPU, triton=False), "cuda", "bfloat16", False),
    ],
)
def test_auto_chooses_by_the_hardware(hardware, device, dtype, compile):
    engine = choose_engine(hardware, flops=LONG)
    assert engine.choices() == {"device": device, "dtype": dtype, "compile": compile}
    assert all(engine.reasons)  # each choice says why
    assert choose_engine(hardware, flops=LONG) == engine  # and is made alike every time
    assert not choose_engine(hardware, flops=SHORT).compile


@pytest.mark.parametrize(
    ("device", "dtype", "compile"),
    [*itertools.product(["cuda", "cuda:1", "cpu"], DTYPES, [True, False])],
)
def test_what_is_asked_for_is_taken(device, dtype, compile):
    engine = choose_engine(GPU, device=device, dtype=dtype, compile=compile, flops=SHORT)
    assert engine.choices() == {"device": device, "dtype": dtype, "compile": compile}


@pytest.mark.parametrize(
    ("hardware", "asked", "message"),
    [
        (LAPTOP, {"device": "gpu"}, "device='gpu': choose auto, cpu, cuda"),
        (LAPTOP, {"device": "cuda:x"}, "device='cuda:x': choose"),
        (LAPTOP, {"device": "cpu:"}, "device='cpu:': choose"),
        (GPU, {"device": "cuda:2"}, "device='cuda:2': PyTorch sees no such device"),
        (LAPTOP, {"device": "cuda"}, "device='cuda': PyTorch sees no such device"),
        (LAPTOP, {"device": "mps"}, "device='mps': PyTorch sees no such device"),
        (LAPTOP, {"dtype": "int8"}, "dtype='int8': choose auto, float32, bfloat16, float16"),
        (LAPTOP, {"compile": "maybe"}, "compile='maybe': choose auto, True or False"),
        (replace(LAPTOP, compiler=False), {"compile": True}, "compile=True: needs a C"),
        (replace(GPU, triton=False), {"compile": True}, "compile=True: needs a C"),
    ],
)
def test_what_the_machine_lacks_is_refused_by_name(hardware, asked, message):
    with pytest.raises(ValueError, match=message):
        choose_engine(hardware, **asked)


def test_this_machine_is_described():
    hardware = find_hardware()
    assert hardware.cuda == torch.cuda.is_available()
    assert hardware.threads == torch.get_num_threads()
    assert choose_engine(hardware).device in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("kind", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_a_cpu_with_instructions_for_bfloat16_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {kind: True})
    assert find_hardware().cpu_bf16 == kind.endswith("bf16")


def test_a_cpu_does_not_compile_for_batches_of_many_shapes():
    assert not choose_engine(LAPTOP, flops=LONG, many_shapes=True).compile
    assert choose_engine(LAPTOP, flops=LONG, many_shapes=True, compile=True).compile
    assert choose_engine(GPU, flops=LONG, many_shapes=True).compile


def test_a_missing_compiler_is_noticed(monkeypatch):
    from nanolm import precision

    monkeypatch.setattr(precision.shutil, "which", lambda name: None)
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    hardware = find_hardware()
    assert not hardware.compiler
    assert not hardware.triton


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_runs_matrix_products_in_the_precision(dtype):
    with Engine("cpu", dtype, compile=False).autocast():
        product = torch.ones(3, 5) @ torch.ones(5, 7)
    assert product.dtype == DTYPES[dtype]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_arrive_on_the_device_unchanged(device):
    ids, targets = np.arange(6).reshape(2, 3), np.full((2, 3), -1)
    moved = Engine(device, "float32", compile=False).move({"ids": ids, "targets": targets})
    assert [t.device.type for t in moved.values()] == [device, device]
    assert np.array_equal(moved["ids"].cpu(), ids)
    assert np.array_equal(moved["targets"].cpu(), targets)
