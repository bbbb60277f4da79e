"""Laws of the plan: what is computed before a run is what the run then needs."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layouts import LAYOUTS, SHAPE, planned, train
from nanolm.layers import ModelConfig
from nanolm.model import build_model, count_parameters
from nanolm.plan.__main__ import main
from nanolm.plan.costs import GPUS, Costs, Layout, PlanConfig, layouts
from nanolm.plan.scaling import PUBLISHED, published, rates
from nanolm.runs.prepare import prepare
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config

ROOT = Path(__file__).resolve().parents[2]
MODERN = {"norm": "rms", "position": "rotary", "mlp": "swiglu"}
SMALL = TrainConfig(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_embd=256)

# ------------------------------------------------------------------------------------------
# Against measurement

QUICK = [("one", {}, "float32")]
MORE = [
    ("both, 2 x 2", MODERN, "bfloat16"),
    ("one", {"gradient_accumulation_steps": 1, "block_size": 512}, "float32"),
    ("one", {"recompute": True, "block_size": 256}, "float32"),
    ("one", {**MODERN, "optimizer": "muon", "n_kv_head": 2, "qk_norm": True}, "float32"),
    ("one", {"dropout": 0.1, "bias": True, "tie_embeddings": False}, "float32"),
    ("one", {"vocab_size": 30000, "n_layer": 4}, "float32"),
    ("one", MODERN, "bfloat16"),
    ("split in 2", {"dropout": 0.1, "block_size": 512}, "float32"),
    *((layout, {}, "float32") for layout in LAYOUTS if layout != "one"),
]


@pytest.mark.parametrize(
    ("layout", "keys", "dtype"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)],
    ids=str,
)
def test_the_memory_of_a_process_is_the_planned_one(layout, keys, dtype):
    """Its peak, to a tenth."""
    size, flags = LAYOUTS[layout]
    keys = {**SHAPE, **keys, **flags}
    peak = max(each["peak"] for each in train(size, keys, 2, dtype))
    assert planned(size, keys, dtype) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "keys",
    [{}, MODERN, {"n_kv_head": 1, "tie_embeddings": False}, {"causal": False}],
    ids=str,
)
def test_the_operations_are_those_that_pytorch_counts(keys):
    config = replace(SMALL, gradient_accumulation_steps=1, batch_size=3, n_hidden=None, **keys)
    costs = Costs(config, Layout(), dtype="float32", device="cpu")
    ids = torch.zeros(3, 64, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits, _ = costs.model(ids)
        logits.sum().backward()
    assert costs.useful_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_published_runs_are_met_where_nothing_waits_for_messages():
    """To 2%. The others wait less than is computed here: they send half as much."""
    pairs = [pair for _, _, *pair in published()]
    assert len(pairs) == len(PUBLISHED)
    off = [computed / said - 1 for computed, said in pairs]
    assert sum(abs(each) < 0.02 for each in off) == 3
    assert all(-0.4 < each < 0.02 for each in off)


# ------------------------------------------------------------------------------------------
# Layouts


def test_the_layouts_are_those_that_training_accepts():
    """And split matrices stay on one machine: of 12 GPUs, groups of 3 would not."""
    config = replace(SMALL, n_head=6, n_kv_head=3, head_size=8, n_hidden=24)
    config = replace(config, gradient_accumulation_steps=12)
    assert {(each.replicas, each.tensor) for each in layouts(6, config)} == {(6, 1), (2, 3)}
    assert all(each.shard for each in layouts(6, config) if each.tensor > 1)
    assert {(each.replicas, each.tensor) for each in layouts(12, config)} == {(12, 1)}
    assert [each.flags for each in layouts(1, config)] == ["", "--recompute=true"]


@pytest.mark.parametrize("keys", [{"dtype": "float16"}, {"compile": True}])
def test_a_run_that_cannot_be_in_parts_is_planned_whole(keys):
    assert {each.flags for each in layouts(8, replace(SMALL, **keys))} == {"", "--recompute=true"}


def test_a_layout_that_is_asked_for_is_the_one_that_is_planned():
    shards = layouts(8, replace(SMALL, shard=True, recompute=True))
    assert {(each.shard, each.recompute) for each in shards} == {(True, True)}
    assert {each.tensor for each in layouts(8, replace(SMALL, tensor_parallel=2))} == {2}


def test_dropout_costs_split_heads_the_fused_kernel():
    def attention(dropout, tensor):
        config = replace(SMALL, dropout=dropout, block_size=1024)
        return Costs(config, Layout(1, tensor), dtype="bfloat16").memory()["activations"]

    assert attention(0.1, 2) > 2 * attention(0.1, 1)
    assert attention(0.0, 2) < attention(0.0, 1)


def test_a_narrow_precision_is_fast_and_its_cache_small():
    wide, narrow = (Costs(SMALL, Layout(), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert wide.cache() == 2 * narrow.cache()
    assert wide.seconds(GPUS["h100"], 0.5)[0] == 2 * narrow.seconds(GPUS["h100"], 0.5)[0]


def test_only_the_tokens_that_are_guessed_have_logits():
    few = replace(SMALL, task="masked", causal=False)
    of_few, of_all = (Costs(each, Layout(), dtype="float32").logits() for each in (few, SMALL))
    assert of_few == pytest.approx(0.15 * of_all)


@pytest.mark.parametrize("size", ["batch_size", "batch_tokens"])
def test_an_update_of_one_size_is_dealt_out_among_more(size):
    """So its processes have less and less to do, and more to say; those that grow have not."""
    keys = {size: 16384, "gradient_accumulation_steps": 64, "vocab_size": 512, "block_size": 8}
    config = PlanConfig(**keys, task="seq2seq", n_encoder_layer=1)
    dealt, grown = rates(config, grow=False), rates(config, grow=True)
    assert dealt[64] == grown[64]
    assert dealt[16384] < 0.5 * grown[16384]


def test_parts_need_less_each_and_recomputing_less_for_activations():
    def memory(*layout):
        return Costs(SMALL, Layout(*layout), dtype="bfloat16").memory()

    for part in ("weights", "gradients", "optimizer"):
        assert memory(8, 1, True)[part] < memory(2, 1, True)[part] < memory(2)[part]
        assert memory(1, 4)[part] < memory(1, 2)[part] < memory()[part]
    assert memory(1, 1, False, True)["activations"] < memory()["activations"] / 3


def test_messages_take_time_where_there_is_someone_to_tell():
    def seconds(*layout):
        return Costs(SMALL, Layout(*layout), dtype="bfloat16").seconds(GPUS["a100"], 0.5)

    work, between, within = seconds()
    assert work > 0
    assert (between, within) == (0, 0)
    assert seconds(8)[1] > 0 == seconds(8)[2]
    assert seconds(1, 8)[2] > 0 == seconds(1, 8)[1]
    assert seconds(16)[1] > 5 * seconds(8)[1]  # another machine is farther away


# ------------------------------------------------------------------------------------------
# The command

WORDS = ["--n_layer=4", "--vocab_size=512", "--gradient_accumulation_steps=8", "--max_iters=10"]


def test_the_cheapest_layout_is_printed_as_flags_that_train_takes(capsys):
    main([*WORDS, "--n_layer=12", "--n_embd=6144", "--n_head=48", "--batch_size=32"])
    out = capsys.readouterr().out
    (flags,) = re.findall(r"^cheapest +(--.*)$", out, re.MULTILINE)
    assert isinstance(load_config(TrainConfig, flags.split()), TrainConfig)
    rows = [line for line in out.splitlines() if line.startswith(("--", "no flags"))]
    assert any(line.endswith("does not fit") for line in rows)
    (chosen,) = (line for line in rows if line.startswith(f"{flags} "))
    assert not chosen.endswith("does not fit")


def test_the_docs_show_what_is_printed(capsys):
    page = (ROOT / "docs/several-gpus.md").read_text()
    (words,) = re.findall(r"^python -m nanolm\.plan (.*)$", page, re.MULTILINE)
    main([str(ROOT / words.split()[0]), *words.split()[1:]])
    out = capsys.readouterr().out
    assert "50,257 tokens, as GPT-2's; --vocab_size" in out
    assert out in page


def test_what_training_would_take_from_elsewhere_is_taken_or_said(capsys, workplace):
    """A dataset's vocabulary, an encoder's direction; but another model's shape is not."""
    Path("text.txt").write_text("a text of few characters " * 40)
    prepare("letters", inputs=("text.txt",), tokenizer="char")
    main(["--n_layer=1", "--dataset=letters", "--task=masked", "--init_from=gpt2"])
    out = capsys.readouterr().out
    size = count_parameters(build_model(ModelConfig(vocab_size=12, n_layer=1, causal=False)))
    assert f"parameters {size:,}" in out
    assert "as GPT-2's" not in out
    assert "\nshape      that of the keys, and not of gpt2\n" in out


def test_what_is_left_out_says_why(capsys):
    main([*WORDS, "--gpus=3", "--gradient_accumulation_steps=40", "--n_embd=768", "--n_head=12"])
    lines = capsys.readouterr().out.splitlines()
    (reason,) = (line for line in lines if line.startswith("left out"))
    assert "gradient_accumulation_steps=40: 3 processes share" in reason


def test_a_task_with_labels_is_planned_without_logits(capsys):
    main([*WORDS, "--task=classification", "--causal=false"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--shard")]
    assert rows
    assert all(line.split("=")[-1].split()[5] == "0.00" for line in rows)


def test_the_picture_is_drawn(workplace):
    main([*WORDS, "--picture=scaling.png"])
    assert (workplace / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=tpu"], "gpu='tpu': choose one of b200, h200, h100, a100, rtx4090"),
        (["--picture=none/x.png"], "picture=none/x.png: cannot be written: No such file"),
        (["--picture=x.pdf"], "picture=x.pdf: the name of a PNG, as scaling.png"),
        (["--compile=maybe"], "compile='maybe': choose one of auto, True, False"),
        (["--batch_tokens=99"], "batch_tokens=99: only seq2seq fills its batches so"),
        (["--gpus=0"], "gpus=0: must be at least 1"),
        (["--dtype=foo"], "dtype='foo': choose one of auto, float32, bfloat16, float16"),
        (["--task=seq2seq"], "trains an encoder-decoder"),
        (["--tensor_parallel=3"], "tensor_parallel=3: 8 processes cannot form groups of 3"),
        (["--tensor_parallel=8"], "tensor_parallel=8: must divide n_head=12"),
        (["--tensor_parallel=2", "--shard=true", "--vocab_size=1"], "too many for vocab_size=1"),
        (["--utilization=1.5"], "utilization=1.5: must be above 0, at most 1"),
        (
            ["--gradient_accumulation_steps=3"],
            "8 processes share the micro-batches of an update",
        ),
        (["--batch_size=100000", "--gpu=rtx4090"], "nothing fits into 92% of a rtx4090"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_one_line(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main([*WORDS, *words])


def test_every_gpu_has_all_its_numbers():
    for gpu in GPUS.values():
        assert all(getattr(gpu, field.name) > 0 for field in fields(gpu))
