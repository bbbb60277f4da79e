"""Laws of several processes: together they make the run that one makes, and fail as one.

The processes are forked children that find each other as those of torchrun do. Each writes down
the state it has after every update, so that what holds at the end is known to hold all the way.
"""

import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from itertools import pairwise, permutations, product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import as_torchrun_does, end, run_train, start_ranks
from conftest import TASKS, TINY
from outcomes import cut
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from nanolm import training
from nanolm.batches import evaluation_batches
from nanolm.parallel import ALONE, World
from nanolm.precision import Engine
from nanolm.runs import checkpoint, run, start
from nanolm.runs.log import read_metrics
from nanolm.runs.processes import (
    all_or_none,
    any_of,
    broadcast,
    choose_backend,
    find_world,
    own_gpu,
)
from nanolm.system.files import lock
from nanolm.system.signals import SIGNALS
from nanolm.text.data import open_dataset
from nanolm.training import TrainState

pytestmark = pytest.mark.usefixtures("tiny_run")  # data/tiny in the current folder

# Twelve micro-batches can be dealt out to 1, 2, 3 and 4 processes.
FLAGS = [*TINY, "--gradient_accumulation_steps=12", "--dropout=0.1", "--sample_tokens=0"]
FLAGS += [
    "--log_interval=1",
    "--max_iters=10",
    "--eval_interval=5",
    "--eval_iters=0",
    "--learning_rate=0.01",
]

# ------------------------------------------------------------------------------------------
# In the children


def nothing(state: TrainState, world: World) -> None:
    """The fault of a run that has none."""


def fingerprint(content: dict) -> str:
    """A hash of all tensors in a content."""
    parts = (tensor.detach().numpy().tobytes() for tensor in checkpoint.tensors(content))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train_watched(fault: Callable[[TrainState, World], None], *arguments: str) -> None:
    """train.py with a fault, put in where its loop begins.

    Writes to rank<N>.json what the state is at that moment, and after each update.
    """
    rows, loop, update = [], run.train, training.update

    def note(state, world):
        whole = state.state_dict(world)  # nothing, in the others that hold parts of a model
        parts = {"weights": whole["model"], "moments": whole["optimizer"]}
        row = {"step": state.step, "skipped": state.skipped, "scaler": state.scaler.state_dict()}
        rows.append(row | {key: fingerprint(part) for key, part in parts.items()})

    def watched_loop(watched):
        fault(watched.state, watched.world)
        note(watched.state, watched.world)
        loop(watched)

    def watched_update(state, *details, **options):
        result = update(state, *details, **options)
        note(state, options["world"])
        return result

    run.train, training.update = watched_loop, watched_update
    try:
        run_train(*arguments)
    finally:
        Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(rows))


# ------------------------------------------------------------------------------------------
# In the tests


def train_together(
    size: int, *arguments: str, fault: Callable = nothing, code: int = 0
) -> list[list[dict]]:
    """Train in so many processes, which all end with this exit code; what each has noted."""
    for log in Path().glob("log*.txt"):
        log.unlink()
    children = start_ranks(size, train_watched, fault, *FLAGS, *arguments)
    assert end(*children) == [code] * size, logs()
    return [json.loads(Path(f"rank{rank}.json").read_text()) for rank in range(size)]


def logs() -> list[str]:
    """What each process has printed."""
    return [path.read_text() for path in sorted(Path().glob("log*.txt"))]


def losses(folder: str, key: str = "loss") -> list[float]:
    """The losses of a run's updates, or with another key those of its evaluations."""
    return [row[key] for row in read_metrics(Path(folder, "metrics.jsonl")) if key in row]


def assert_close(a: list[float], b: list[float], tolerance: float = 1e-5) -> None:
    __tracebackhide__ = True
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance * max(1, *map(abs, b))


# ------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        *((size, ["--optimizer=muon"]) for size in (2, 3, 4)),
        (2, ["--optimizer=adamw"]),
        (2, ["--recompute=true"]),
        *product((2, 4), TASKS.values()),
    ],
    ids=str,
)
def test_many_processes_learn_what_one_does(size, keys):
    """Losses, norms and evaluations, with dropout; and all hold the same weights, bit for bit."""
    train_together(1, "--out_dir=out/one", *keys)
    first, *others = train_together(size, "--out_dir=out/many", *keys)
    for key, n in (("loss", 10), ("grad_norm", 10), ("train_loss", 3), ("val_loss", 3)):
        assert len(losses("out/one", key)) == n
        assert_close(losses("out/many", key), losses("out/one", key))
    assert [row["step"] for row in first] == list(range(11))
    assert all(other == first for other in others)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_processes_learn_what_one_does_in_half_precision(dtype):
    """Roughly so; but among themselves they agree to the bit, also on the scale of the loss."""
    (alone,) = train_together(1, f"--dtype={dtype}", "--out_dir=out/one")
    first, other = train_together(2, f"--dtype={dtype}", "--out_dir=out/many")
    for key in ("loss", "val_loss"):
        assert_close(losses("out/many", key), losses("out/one", key), tolerance=0.03)
    assert first == other
    assert [row["scaler"] for row in first] == [row["scaler"] for row in alone]


@pytest.mark.parametrize(
    ("before", "after"),
    list(permutations((1, 2, 4), 2)),
)
def test_a_run_moves_to_another_number_of_processes(before, after):
    train_together(before, "--out_dir=out/whole")
    moved = cut("out/whole", after=5)
    rows = train_together(after, f"--out_dir={moved}", "--init_from=resume")
    assert rows[0][0]["step"] == 5
    for key in ("loss", "grad_norm", "val_loss"):
        assert_close(losses(moved, key), losses("out/whole", key))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_resumed_run_of_many_processes_is_the_run_that_never_stopped(size):
    """To the last bit. A sum of three numbers depends on their order, and DDP changes its own
    after the first backward pass: what the first update of a run must not notice.
    """
    whole = train_together(size, "--out_dir=out/whole")
    resumed = cut("out/whole", after=5)
    rows = train_together(size, f"--out_dir={resumed}", "--init_from=resume")
    assert rows == [row[5:] for row in whole]
    for key in ("loss", "grad_norm", "train_loss", "val_loss"):
        assert losses(resumed, key) == losses("out/whole", key)


# ------------------------------------------------------------------------------------------
# What they tell each other


def trace(state: TrainState, world: World) -> None:
    """Write the messages of update 3, and what happens between them, to trace<N>.txt."""

    def note(event):
        if state.step == 3:
            with open(f"trace{world.rank}.txt", "a") as file:
                print(event, file=file)

    def noted(name, function, size=lambda *_: ""):
        @wraps(function)
        def call(*arguments, **options):
            result = function(*arguments, **options)
            note(f"{name}{size(*arguments)}")
            return result

        return call

    state.forward.register_comm_hook(None, allreduce_hook)  # what DDP does, but in Python
    state.forward.forward = noted("forward", state.forward.forward)
    torch.Tensor.backward = noted("backward", torch.Tensor.backward)
    dist.all_reduce = noted("sum of ", dist.all_reduce, torch.Tensor.numel)
    for name in ("broadcast", "all_gather_object", "broadcast_object_list", "barrier"):
        setattr(dist, name, noted(name, getattr(dist, name)))


@pytest.mark.parametrize("accumulation", [4, 6])
def test_gradients_are_summed_once_per_update(accumulation):
    """After the last micro-batch of each process; and there is one more message, a small one."""
    keys = [f"--gradient_accumulation_steps={accumulation}", "--max_iters=5"]
    train_together(2, "--out_dir=out/x", *keys, fault=trace)
    weights = checkpoint.load("out/x/step_00000005.pt")["model"]
    n = sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())
    held_back = ["forward", "backward"] * (accumulation // 2 - 1)
    message = f"sum of {1 + len(SIGNALS)}"  # the loss, and which signals came
    expected = [*held_back, "forward", f"sum of {n}", "backward", message]
    for rank in (0, 1):
        assert Path(f"trace{rank}.txt").read_text().splitlines() == expected


def evaluate_watched(*arguments: str) -> None:
    """train.py, which writes the ids of each batch it evaluates to batches<N>.jsonl."""
    evaluate = run.evaluate

    def watched(model, batches, **options):
        batches = list(batches)
        with open(f"batches{os.environ['RANK']}.jsonl", "a") as file:
            counted = [batch for batch in batches if (batch["targets"] >= 0).any()]
            print(json.dumps([batch["ids"].tolist() for batch in counted]), file=file)
        return evaluate(model, batches, **options)

    run.evaluate = watched
    run_train(*arguments)


@pytest.mark.parametrize(("size", "eval_iters"), [(3, 0), (4, 2), (2, 5)])
def test_processes_share_an_evaluation(size, eval_iters):
    """Each batch is evaluated once, by one of them; one that gets none has nothing to add."""
    flags = [*FLAGS, "--eval_only=true", f"--eval_iters={eval_iters}", "--out_dir=out/x"]
    assert end(*start_ranks(size, evaluate_watched, *flags)) == [0] * size, logs()
    dataset = open_dataset("tiny")
    shape = {"batch_size": 2, "block_size": 8}
    n = math.ceil((len(dataset.val) - 1) / 8 / 2)
    wanted = [
        evaluation_batches(dataset.train, **shape, n_batches=eval_iters or n),
        evaluation_batches(dataset.val, **shape, n_batches=eval_iters),
    ]
    lines = [Path(f"batches{rank}.jsonl").read_text().splitlines() for rank in range(size)]
    for i, batches in enumerate(wanted):
        shares = [json.loads(line[i]) for line in lines]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        together = sorted(batch for share in shares for batch in share)
        assert together == sorted(batch["ids"].tolist() for batch in batches)


def test_only_the_first_process_speaks_and_writes():
    train_together(2, "--out_dir=out/x", "--sample_tokens=5", "--max_iters=4")
    first, other = logs()
    assert "step      3 | loss " in first
    assert "done " in first
    assert other == ""


# ------------------------------------------------------------------------------------------
# What is not finite


def break_updates(state: TrainState, world: World, *, faults: dict[int, str], rank: int) -> None:
    """Let the loss or the gradient of these updates be not finite, in one process."""

    def break_loss(model, inputs, outputs):
        fault = faults.get(state.step)
        if model.training and fault in ("nan", "inf"):
            logits, loss = outputs
            return logits, loss * float(fault)

    def break_gradient(gradient):
        return gradient * math.inf if faults.get(state.step) == "gradient" else gradient

    if world.rank == rank:
        state.model.register_forward_hook(break_loss)
        state.model.norm.weight.register_hook(break_gradient)


def errors() -> list[str]:
    """The lines of all logs that say an error; none shows the inside of the program."""
    assert "Traceback" not in "".join(logs())
    return [line for log in logs() for line in log.splitlines() if line.startswith("error:")]


def assert_checkpoints_are_finite(folder: str, *, steps: list[int]) -> None:
    __tracebackhide__ = True
    paths = checkpoint.step_files(folder)
    assert [checkpoint.step_of(path) for path in paths] == steps
    for path in [*paths, Path(folder, checkpoint.BEST)]:
        assert checkpoint.is_finite(checkpoint.load(path))


@pytest.mark.parametrize(
    ("size", "rank"),
    [(1, 0), (2, 1), (2, 0), (4, 2)],
)
def test_an_update_that_is_not_finite_in_one_process_is_made_by_none(size, rank):
    """It is counted by all; weights and moments stay, and the next update goes on from them."""
    faults = {0: "nan", 2: "inf", 4: "gradient", 6: "nan", 7: "gradient"}
    keys = ["--out_dir=out/x", "--eval_interval=1", "--eval_iters=1", "--keep_checkpoints=10"]
    fault = partial(break_updates, faults=faults, rank=rank)
    first, *others = train_together(size, *keys, fault=fault)
    assert all(other == first for other in others)
    assert [row["step"] for row in first] == list(range(11))
    assert [row["skipped"] for row in first] == [0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 0]
    for step in range(10):
        for part in ("weights", "moments"):
            assert (first[step][part] == first[step + 1][part]) == (step in faults)
    assert [loss is not None for loss in losses("out/x")] == [
        faults.get(step, "gradient") == "gradient" for step in range(10)
    ]
    assert_checkpoints_are_finite("out/x", steps=list(range(1, 11)))


@pytest.mark.parametrize(
    ("size", "kind", "dtype"),
    [
        (1, "gradient", "float32"),
        (2, "nan", "float32"),
        (1, "nan", "bfloat16"),
        (2, "gradient", "float32"),
    ],
)
def test_three_updates_in_a_row_that_are_not_finite_end_the_run_with_one_line(size, kind, dtype):
    fault = partial(break_updates, faults=dict.fromkeys((4, 5, 6, 7), kind), rank=size - 1)
    first, *others = train_together(
        size, "--out_dir=out/x", f"--dtype={dtype}", fault=fault, code=2
    )
    assert all(other == first for other in others)
    assert [row["skipped"] for row in first] == [0, 0, 0, 0, 0, 1, 2, 3]
    (line,) = errors()
    assert line in logs()[0]
    assert line.startswith("error: 3 updates in a row were not finite, the last one in step 6 ")
    for advice in ("out/x/step_00000005.pt", "init_from=resume", "learning_rate"):
        assert advice in line
    assert ("dtype=float32" in line) == (dtype != "float32")  # which it has already
    assert not any(logs()[1:])
    assert_checkpoints_are_finite("out/x", steps=[5])


def overflow_at_first(state: TrainState, world: World) -> None:
    """Let the gradients of the last process leave float16's range until the scale has fallen."""
    if world.rank == world.size - 1:
        for parameter in state.model.parameters():
            parameter.register_hook(lambda g: (g * 2**12).half().float() / 2**12)


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_scale_that_is_too_high_at_first_falls_alike_in_all_processes(size):
    """And those updates do not count, however many they are."""
    keys = ["--dtype=float16", "--out_dir=out/x", "--learning_rate=1e-3"]
    first, *others = train_together(size, *keys, fault=overflow_at_first)
    assert all(other == first for other in others)
    assert {row["skipped"] for row in first} == {0}
    scales = [row["scaler"]["scale"] for row in first]
    assert scales[0] / scales[-1] >= 2**4
    for before, after in pairwise(first):
        lowered = before["scaler"]["scale"] != after["scaler"]["scale"]
        assert (before["weights"] == after["weights"]) == lowered


def spoil_weights(state: TrainState, world: World) -> None:
    """Let update 7 leave weights that are not finite where the last process is asked to save."""

    def after_update(optimizer, arguments, options):
        if state.step == 6 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if state.step == 7:
            state.model.norm.weight.data[0] = math.nan

    state.optimizer.register_step_post_hook(after_update)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_are_not_finite_are_not_saved_at_a_signal(size):
    """The run stops there, and the last sound checkpoint stays."""
    train_together(size, "--out_dir=out/x", fault=spoil_weights, code=2)
    (line,) = errors()
    assert line.startswith("error: the weights are not finite any more; the last checkpoint is ")
    assert "out/x/step_00000005.pt" in line
    assert not any(logs()[1:])
    assert_checkpoints_are_finite("out/x", steps=[5])


# ------------------------------------------------------------------------------------------
# Errors


def files() -> dict[str, bytes]:
    """All files below the current folder, but for the logs."""
    paths = (path for path in Path().rglob("*") if not re.fullmatch(r"log\d\.txt", path.name))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def train_on_another_text(*arguments: str) -> None:
    """train.py, which finds another text under data/ in the second process."""

    def other_text(name):
        dataset = open_dataset(name)
        split = {**dataset.meta["train"], "sha256": "0" * 64}
        return replace(dataset, meta={**dataset.meta, "train": split})

    if os.environ["RANK"] == "1":
        start.find_dataset = other_text
    run_train(*arguments)


def train_without_memory(*arguments: str) -> None:
    """train.py, which cannot build its model in the second process."""

    def fail(config, tokenizer):
        raise ValueError("the model\ndoes not fit")

    if os.environ["RANK"] == "1":
        start.make_task = fail
    run_train(*arguments)


@pytest.mark.parametrize(
    ("child", "key", "message"),
    [
        (run_train, "--gradient_accumulation_steps=3", "it must be a multiple of 2, as 4"),
        (run_train, "--no_such_key=1", "no_such_key"),
        (run_train, "--dataset=none", "none"),
        (run_train, "--init_from=resume", "out/x"),
        (run_train, "--out_dir=out/tiny", "out/tiny already holds a run"),
        (run_train, "--out_dir=out/locked", "out/locked is in use by another process"),
        (train_on_another_text, "--seed=2", "holds other tokens than that of process 0"),
        (train_without_memory, "--seed=2", "the model does not fit (says process 1)"),
    ],
    ids=["shares", "key", "dataset", "resume", "there", "locked", "text", "build"],
)
def test_what_is_wrong_at_the_start_is_said_once_and_changes_nothing(child, key, message):
    Path("out/locked").mkdir()
    before = files()
    with lock("out/locked"):
        children = start_ranks(2, as_torchrun_does, child, *FLAGS, "--out_dir=out/x", key)
        assert end(*children, timeout=20) == [2, 2], logs()
    (line,) = errors()
    assert message in line
    assert line in logs()[0]
    assert logs()[1] == ""
    assert files() == before


def die(state: TrainState, world: World, *, rank: int, evaluating: bool) -> None:
    """Let a process end without a word in the middle of update 3, or in an evaluation."""

    def end_at_once(model, inputs):
        if state.step == (5 if evaluating else 3) and model.training != evaluating:
            os._exit(1)

    if world.rank == rank:
        state.model.register_forward_pre_hook(end_at_once)


@pytest.mark.parametrize(
    ("size", "rank", "evaluating"),
    [
        (2, 1, False),
        pytest.param(3, 1, True, marks=pytest.mark.long),
        pytest.param(2, 0, False, marks=pytest.mark.long),
        pytest.param(2, 1, True, marks=pytest.mark.long),
        pytest.param(4, 3, False, marks=pytest.mark.long),
    ],
)
def test_the_processes_end_when_one_of_them_dies(size, rank, evaluating):
    fault, started = partial(die, rank=rank, evaluating=evaluating), time.monotonic()
    children = start_ranks(size, train_watched, fault, *FLAGS, "--out_dir=out/x")
    assert end(*children, timeout=20) == [1 if i == rank else 2 for i in range(size)], logs()
    assert time.monotonic() - started < 20
    assert errors() == ["error: another process of this run has ended; what it says tells why"] * (
        rank > 0
    )
    assert not any(logs()[1:])


# ------------------------------------------------------------------------------------------
# By itself


def test_a_process_alone_needs_no_others():
    """Nothing of torch.distributed is touched: what it would tell others stays as it is."""
    assert not dist.is_initialized()
    assert ALONE.leads
    assert ALONE.all_reduce(torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]
    assert any_of(ALONE, [True, False]) == [True, False]
    assert broadcast(ALONE, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        broadcast(ALONE, lambda: 1 / 0)
    with pytest.raises(ValueError, match=r"^as it is$"), all_or_none(ALONE):
        raise ValueError("as it is")
    model, engine = torch.nn.Linear(2, 3), Engine("cuda:7", "float32", compile=False)
    with ALONE.sharing_gradients(model) as forward:
        assert forward is model
    assert own_gpu(ALONE, engine) is engine


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")


def test_a_process_learns_from_torchrun_which_one_it_is(monkeypatch):
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert find_world() == ALONE == World(rank=0, size=1, local_rank=0, restarts=0, launch="")
    for name, value in zip(VARIABLES, "3517", strict=True):
        monkeypatch.setenv(name, value)
    assert find_world() == World(rank=3, size=5, local_rank=1, restarts=7)
    assert not find_world().leads
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert find_world().launch == f"mine of process {os.getppid()}"


@pytest.mark.parametrize("value", ["", "two", "-1", "1.5"])
@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_is_no_number_is_named(name, value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}='{re.escape(value)}'"):
        find_world()


@pytest.mark.parametrize("gpu", [False, True])
def test_the_backend_follows_the_hardware_unless_it_is_asked_for(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_backend("auto") == ("nccl" if gpu else "gloo")
    assert choose_backend("gloo") == "gloo"
    if gpu:
        assert choose_backend("nccl") == "nccl"
    else:
        with pytest.raises(ValueError, match="no NVIDIA GPU here; use --backend=auto"):
            choose_backend("nccl")


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("cuda", 0, "cuda:0"),
        ("cuda", 1, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "process 2 of this machine has no GPU: there are 2; start with --nproc"),
        ("cuda:1", 0, "device='cuda:1' is for one process; 3 were started"),
        ("mps", 0, "device='mps' is for one process; 3 were started"),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(device, local_rank, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world, engine = World(local_rank, 3, local_rank), Engine(device, "float32", compile=False)
    if " " in expected:
        with pytest.raises(ValueError, match=re.escape(expected)):
            own_gpu(world, engine)
    else:
        assert own_gpu(world, engine).device == expected
    assert chosen == ([local_rank] if ":" in expected and " " not in expected else [])
