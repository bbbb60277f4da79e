"""Laws of layouts: a run is the same, whichever part of the model each of its processes holds.

The layouts are those of parallel.py: replicas, shards, split matrices, and shards of these.
"""

import math
from collections.abc import Collection, Iterable
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from children import as_torchrun_does, end, run_train, start_ranks
from conftest import TASKS
from outcomes import cut
from test_processes import (
    FLAGS,
    assert_close,
    break_updates,
    die,
    errors,
    files,
    fingerprint,
    logs,
    losses,
    nothing,
    train_together,
    train_watched,
)

from nanolm import loss
from nanolm.parallel import World, split_product
from nanolm.runs import checkpoint
from nanolm.runs.prepare import prepare
from nanolm.training import TrainState

pytestmark = pytest.mark.usefixtures("tiny_run")  # data/tiny in the current folder

# Twelve heads can be split among 1, 2, 3 and 4 processes; the 29 characters of the text cannot.
SHAPE = ["--n_head=12", "--head_size=2", "--n_hidden=24", "--n_layer=2"]
FEW = [*SHAPE, "--max_iters=4", "--eval_interval=4", "--gradient_accumulation_steps=4"]
LAYOUTS = {  # processes, --shard, --tensor_parallel
    "one": (1, "false", 1),
    **{f"replicas{n}": (n, "false", 1) for n in (2, 3, 4)},
    **{f"shards{n}": (n, "true", 1) for n in (2, 3, 4)},
    **{f"split{n}": (n, "false", n) for n in (2, 3, 4)},
    "both": (4, "true", 2),
}
PARTS = [layout for layout in LAYOUTS if layout.startswith(("shards", "split", "both"))]


def long_but(quick: Collection, cases: Iterable) -> list:
    """Parameters of a test: all cases, of which the others than the quick ones take long."""
    return [pytest.param(*c, marks=() if c in quick else pytest.mark.long) for c in cases]


def parts_but(*quick: str) -> list:
    """The same of all layouts in parts."""
    return long_but([(layout,) for layout in quick], [(layout,) for layout in PARTS])


def train_in(layout: str, name: str, *keys: str, fault=nothing) -> list[list[dict]]:
    """Train in a layout; what each process has noted."""
    size, *_ = LAYOUTS[layout]
    words = [f"--out_dir=out/{name}", *SHAPE, *flags_of(layout), *keys]
    return train_together(size, *words, fault=fault)


def flags_of(layout: str) -> list[str]:
    _, shard, tensor = LAYOUTS[layout]
    return [f"--shard={shard}", f"--tensor_parallel={tensor}"]


def assert_same_run(name: str, other: str, tolerance: float = 1e-5) -> None:
    __tracebackhide__ = True
    for key in ("loss", "grad_norm", "train_loss", "val_loss"):
        assert losses(f"out/{name}", key)
        assert_close(losses(f"out/{name}", key), losses(f"out/{other}", key), tolerance)


# ------------------------------------------------------------------------------------------
# A product in parts


def compare_with_split_product(state: TrainState, world: World) -> None:
    """Check that the MLP of a split model computes what the textbook does."""
    mlp = state.model.blocks[0].mlp
    x = torch.linspace(-1, 1, 3 * state.model.config.n_embd).view(3, -1)
    first, second = (layer.weight.full_tensor().T for layer in (mlp.up, mlp.down))
    with torch.no_grad():
        y = mlp(x).numpy()

    def between(own: np.ndarray) -> np.ndarray:
        return mlp.activation(torch.from_numpy(own)).numpy()

    arrays = (x.numpy(), first.detach().numpy(), second.detach().numpy())
    np.testing.assert_allclose(y, split_product(*arrays, between, world.size), atol=1e-6)


def test_the_layers_of_split_matrices_are_the_textbook_s():
    train_in("split3", "x", "--mlp=gelu", "--max_iters=0", fault=compare_with_split_product)


# ------------------------------------------------------------------------------------------
# The same run

QUICK = {
    ("shards2", "muon", 3, True),
    ("split3", "muon", 1, True),
    ("both", "adamw", 1, False),
}


@pytest.mark.parametrize(
    ("layout", "optimizer", "each", "tie"),
    long_but(QUICK, product([*LAYOUTS][1:], ("adamw", "muon"), (1, 3), (True, False))),
)
def test_a_run_is_the_same_in_every_layout(layout, optimizer, each, tie):
    """Losses, norms and evaluations of ten updates, with dropout.

    each: how many micro-batches each replica has.
    """
    n = each * (1 if layout.startswith("split") else 2 if layout == "both" else int(layout[-1]))
    keys = [f"--gradient_accumulation_steps={n}", f"--optimizer={optimizer}", "--bias=true"]
    keys += [f"--tie_embeddings={tie}", "--learning_rate=0.003"]
    train_in("one", "one", *keys)
    first, *_ = train_in(layout, "parts", *keys)
    assert [row["step"] for row in first] == list(range(11))
    said = "groups of 2 that split matrices and shards of the model" if layout == "both" else ""
    assert f"{said}, and {each} of an update's micro-batches each" in logs()[0]
    assert_same_run("parts", "one")
    weights = checkpoint.load("out/parts/step_00000010.pt")["model"]
    assert torch.equal(weights["head.weight"], weights["tokens.weight"]) == tie


GROUPED = ["--qk_norm=true", "--n_kv_head=4"]
CLASSIC = ["--norm=layer", "--bias=true", "--position=learned", "--mlp=gelu"]


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("split2", GROUPED),
        ("split3", TASKS["classification"]),
        ("both", [*CLASSIC, "--recompute=true"]),
        ("shards2", [*CLASSIC, "--recompute=true"]),
        ("split2", ["--optimizer=sgd", "--learning_rate=1"]),
        pytest.param("both", ["--optimizer=sgd", "--learning_rate=1"], marks=pytest.mark.long),
        pytest.param("both", ["--optimizer=lamb"], marks=pytest.mark.long),
        *(
            pytest.param(layout, keys, marks=() if layout == quick else pytest.mark.long)
            for (keys, quick), layout in product(
                zip(
                    TASKS.values(),
                    ("split2", "shards2", "split2", "shards2", "both"),
                    strict=True,
                ),
                ("shards2", "split2", "both"),
            )
        ),
    ],
    ids=str,
)
def test_every_model_and_task_is_trained_in_parts(layout, keys):
    keys = [*FEW, *keys]
    train_in("one", "one", *keys)
    train_in(layout, "parts", *keys)
    assert_same_run("parts", "one")


HALF = list(product(("shards4", "split4", "both"), ("layer", "rms")))


@pytest.mark.parametrize(
    ("layout", "norm"),
    long_but(HALF[-1:], HALF),
)
def test_in_bfloat16_it_is_the_same_to_its_rounding(layout, norm):
    keys = [*FEW, "--dtype=bfloat16", f"--norm={norm}", "--bias=true", "--sample_tokens=5"]
    train_in("one", "one", *keys)
    train_in(layout, "parts", *keys)
    assert_same_run("parts", "one", tolerance=0.01)


ANSWERS = list(product(("shards2", "both"), ("completion", "seq2seq")))


@pytest.mark.parametrize(("layout", "task"), long_but([("shards2", "seq2seq")], ANSWERS))
def test_in_bfloat16_a_model_in_parts_answers(layout, task):
    """In samples, too, which are drawn outside of updates and evaluations."""
    keys = [*FEW, *TASKS[task], "--dtype=bfloat16", "--sample_tokens=5"]
    train_in("one", "one", *keys)
    train_in(layout, "parts", *keys)
    assert_same_run("parts", "one", tolerance=0.01)


def take_small_chunks(state: TrainState, world: World) -> None:
    """Let the loss compute so few logits at a time that it needs several chunks."""
    loss.CHUNK["cpu"] = 40


def test_the_loss_is_cut_alike_where_a_vocabulary_is_split_unevenly():
    """Of 29 tokens the last process has 5: it could compute more rows at a time than others."""
    train_in("one", "one", *FEW)
    train_in("split4", "parts", *FEW, fault=take_small_chunks)
    assert_same_run("parts", "one")


def note_parts(state: TrainState, world: World) -> None:
    """Write how many numbers this process holds, of weights and of all."""
    weights = list(state.model.parameters())
    held = sum(p.to_local().numel() for p in weights)
    Path(f"held{world.rank}.txt").write_text(f"{held} {sum(p.numel() for p in weights)}")


@pytest.mark.parametrize("layout", parts_but("shards2", "split3"))
def test_each_process_holds_its_part(layout):
    """Of split matrices, each process has the few vectors whole."""
    size = LAYOUTS[layout][0]
    keys = ["--max_iters=0", "--n_embd=64", f"--gradient_accumulation_steps={size}"]
    train_in(layout, "x", *SHAPE, *keys, fault=note_parts)
    for rank in range(size):
        held, total = map(int, Path(f"held{rank}.txt").read_text().split())
        assert held <= 1.1 * total / size


# ------------------------------------------------------------------------------------------
# Checkpoints

MOVES = list(permutations(("one", "replicas2", "shards2", "split2", "both"), 2))
QUICK_MOVES = {("one", "both"), ("shards2", "split2")}


@pytest.mark.parametrize(
    ("before", "after"),
    long_but(QUICK_MOVES, MOVES),
)
def test_a_run_moves_to_another_layout(before, after):
    """With its weights and moments to the bit; then it goes on as if it had not moved."""
    keys = ["--gradient_accumulation_steps=4", "--max_iters=6", "--eval_interval=3"]
    train_in(before, "whole", *keys)
    moved = cut("out/whole", after=3)
    rows = train_in(after, moved.name, *keys, "--init_from=resume")
    content = checkpoint.load(moved / "step_00000003.pt")
    for part, key in (("weights", "model"), ("moments", "optimizer")):
        assert rows[0][0][part] == fingerprint(content[key])
    assert_same_run(moved.name, "whole")


@pytest.mark.parametrize("layout", ["shards2", "split2"])
def test_a_run_in_parts_begins_with_another_model_s_weights(layout):
    """And with a head of its own, where that fits another task."""
    prepare("more", task="classification", inputs=("kinds.csv",), tokenizer="data/words")
    train_in("one", "source", *FEW, *TASKS["masked"])
    keys = [*FEW, "--task=classification", "--dataset=more", "--init_from=out/source"]
    train_in("one", "one", *keys)
    train_in(layout, "parts", *keys)
    assert_same_run("parts", "one")


@pytest.mark.parametrize("layout", parts_but("shards2"))
def test_a_resumed_run_in_parts_is_the_run_that_never_stopped(layout):
    """To the last bit."""
    keys = ["--max_iters=6", "--eval_interval=3"]
    whole, *_ = train_in(layout, "whole", *keys)
    resumed = cut("out/whole", after=3)
    first, *_ = train_in(layout, resumed.name, *keys, "--init_from=resume")
    assert first == whole[3:]
    assert losses(resumed, "loss") == losses("out/whole", "loss")


# ------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("layout", parts_but("shards2"))
def test_an_update_that_is_not_finite_in_one_process_is_made_by_none_in_parts(layout):
    faults = {0: "nan", 2: "inf", 5: "nan"}
    fault = partial(break_updates, faults=faults, rank=LAYOUTS[layout][0] - 1)
    first, *others = train_in(
        layout,
        "x",
        *FEW,
        "--gradient_accumulation_steps=12",
        "--max_iters=7",
        "--eval_interval=1",
        "--keep_checkpoints=9",
        fault=fault,
    )
    assert [row["skipped"] for row in first] == [0, 1, 0, 1, 0, 0, 1, 0]
    assert all([row["skipped"] for row in other] == [0, 1, 0, 1, 0, 0, 1, 0] for other in others)
    for step in range(7):
        assert (first[step]["weights"] == first[step + 1]["weights"]) == (step in faults)
    assert not math.isfinite(losses("out/x")[2] or math.inf)


@pytest.mark.parametrize(
    ("layout", "evaluating"),
    [
        ("shards2", False),
        ("split2", True),
        pytest.param("shards2", True, marks=pytest.mark.long),
        pytest.param("split2", False, marks=pytest.mark.long),
        pytest.param("both", False, marks=pytest.mark.long),
    ],
)
def test_the_processes_of_parts_end_when_one_of_them_dies(layout, evaluating):
    size, *_ = LAYOUTS[layout]
    keys = [*FEW, *flags_of(layout), "--max_iters=10", "--eval_interval=5", "--sample_tokens=0"]
    fault = partial(die, rank=size - 1, evaluating=evaluating)
    children = start_ranks(size, train_watched, fault, *FLAGS, *keys, "--out_dir=out/x")
    assert end(*children, timeout=30) == [2] * (size - 1) + [1], logs()
    assert {*errors()} == {"error: another process of this run has ended; what it says tells why"}


@pytest.mark.parametrize(
    ("size", "keys", "message"),
    [
        (2, ["--tensor_parallel=3"], "tensor_parallel=3: 2 processes cannot form groups of 3"),
        (4, ["--tensor_parallel=2"], "tensor_parallel=2 on 4 processes: add --shard=true"),
        (2, ["--tensor_parallel=2", "--n_head=3", "--head_size=8"], "must divide n_head=3"),
        (2, ["--tensor_parallel=2", "--n_kv_head=1"], "must divide n_kv_head=1"),
        (2, ["--tensor_parallel=2", "--n_hidden=7"], "must divide n_hidden=7"),
        (2, ["--shard=true", "--dtype=float16"], "dtype='float16': a model in parts"),
        (2, ["--shard=true", "--compile=true"], "compile=True: a model in parts"),
        (3, ["--shard=true", "--gradient_accumulation_steps=4"], "must be a multiple of 3, as 6"),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(size, keys, message):
    before = files()
    flags = ["--dataset=tiny", "--device=cpu", *SHAPE, "--gradient_accumulation_steps=12"]
    children = start_ranks(size, as_torchrun_does, run_train, *flags, "--out_dir=out/x", *keys)
    assert end(*children, timeout=20) == [2] * size, logs()
    (line,) = errors()
    assert message in line
    assert files() == before
