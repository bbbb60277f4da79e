"""The benchmarks run, on work that is small; what they say is another matter."""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import write_texts_of_tasks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    answers,
    attention,
    compare,
    encoder,
    layouts,
    memory,
    sample,
    time_to_loss,
    tokenizer,
    train,
)
from nanolm.runs.prepare import prepare
from nanolm.text.corpus import Corpus
from nanolm.text.documents import documents

# Stands for a checkout of nanoGPT: what the benchmarks call, over a model of one embedding.
MODEL = """
import torch
from dataclasses import dataclass
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 65
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 4
    dropout: float = 0.0
    bias: bool = False


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, 4)

    def configure_optimizers(self, weight_decay, lr, betas, kind):
        print("using fused AdamW")
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        z = self.table(idx) @ self.table.weight.T
        return z, F.cross_entropy(z.view(-1, z.shape[-1]), targets.view(-1), ignore_index=-1)

    def generate(self, ids, n, temperature, top_k):
        return torch.cat([ids] + [ids[:, -1:]] * n, dim=1)
"""
TRAIN = """
import sys, torch, numpy as np
from model import GPT, GPTConfig
assert "--device=cpu" in sys.argv
import pickle
vocab_size = pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["vocab_size"]
assert np.fromfile("data/shakespeare_char/val.bin", np.uint16).max() < vocab_size
config = {"block_size": 64, "vocab_size": VOCABULARY or vocab_size, "n_layer": 1}
saved = {"model": GPT(GPTConfig(**config)).state_dict(), "model_args": config, "iter_num": 1}
import os; os.makedirs("out-shakespeare-char"); torch.save(saved, "out-shakespeare-char/ckpt.pt")
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like nanoGPT to the benchmarks."""
    folder = tmp_path / "nanoGPT"
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text("VOCABULARY = 0\n" + TRAIN)
    return folder


def test_a_contest_takes_turns_and_gives_the_median_of_each(monkeypatch, capsys):
    clock, turns = iter([0, 3, 10, 14, 20, 21, 30, 35, 40, 42, 50, 56]), []
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    runs = {name: lambda name=name: turns.append(name) for name in ("ours", "theirs")}
    assert compare.contest("a race", runs, repeats=3) == {"ours": 2, "theirs": 5}
    assert turns == ["ours", "theirs"] * 3
    assert "x     2.50" in capsys.readouterr().out


def test_the_benchmark_of_the_tokenizer_runs(monkeypatch, capsys, workplace):
    text = "to be or not to be, that is the question\n" * 300
    monkeypatch.setattr(
        tokenizer, "tiny_shakespeare", lambda folder: Corpus("x", lambda: documents([text]))
    )
    for name, value in {"SMALL": 280, "MIDDLE": 270, "LARGE": 400}.items():
        monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(tokenizer, "LARGE_TEXT", 30_000)
    monkeypatch.setattr(tokenizer, "FILE", 50_000)
    tokenizer.main(["--repeats=1", "--json=results.json"])
    results = json.loads((workplace / "results.json").read_text())
    assert results["train_middle"]["nanolm"] > 0
    assert 10 < results["prepare"]["peak MB"] < 1_000
    assert "tokenizers (Rust)" in capsys.readouterr().out


def test_the_benchmark_of_training_runs(monkeypatch, checkout, workplace, capsys):
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2}
    monkeypatch.setitem(train.SHAPES, "cpu-12", tiny)
    monkeypatch.setattr(
        train, "choose_engine", lambda *args, **kw: train.Engine("cpu", "float32", compile=False)
    )
    monkeypatch.setattr(train.torch, "compile", lambda model: model)  # takes its time
    words = ["--shapes=cpu-12", "--repeats=1", "--updates=2", "--json=results.json"]
    train.main([f"--nanogpt={checkout}", *words])
    result = json.loads((workplace / "results.json").read_text())["cpu-12"]
    theirs = (result[f"nanoGPT float32 {kind}"]["tokens/s"] for kind in ("compiled", "uncompiled"))
    ours = result["nanolm float32 uncompiled"]
    assert result["ratio"] == pytest.approx(ours["tokens/s"] / max(theirs))
    assert ours["share of the floor"] > 0
    assert result["matrix products alone"]["share of the floor"] == 1
    assert "using fused AdamW" not in capsys.readouterr().out


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkout of nanoGPT"):
        train.main([f"--nanogpt={tmp_path}"])


def test_the_floor_of_training_has_all_of_its_products():
    """As many as flops_per_token counts, but for the norms, whose six are no product."""
    config = train.TrainConfig(
        vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=12, batch_size=3
    )
    engine = train.Engine("cpu", "float32", compile=False)
    counter = FlopCounterMode(display=False)
    run = train.bare_products(config, engine, 1)
    with counter:
        run()
    model = train.GPT(config.model_config())
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert counter.get_total_flops() == (train.flops_per_token(model) - 6 * vectors) * 3 * 8


def test_the_benchmark_of_attention_runs(monkeypatch, workplace, capsys):
    monkeypatch.setattr(attention, "LENGTHS", (4, 8))
    monkeypatch.setattr(attention, "WIDTHS", (64,))
    monkeypatch.setattr(attention, "TOKENS", 16)
    attention.main(["--repeats=1", "--json=results.json"])
    results = json.loads((workplace / "results.json").read_text())
    assert results["bfloat16, 64 channels, padded"]["8"] > 0
    assert "causal" in capsys.readouterr().out


def test_the_benchmark_of_sampling_runs(monkeypatch, checkout, workplace):
    monkeypatch.setattr(
        sample, "SHAPE", {**sample.SHAPE, "n_layer": 1, "n_embd": 12, "block_size": 16}
    )
    words = ["--repeats=1", "--tokens=5", "--json=results.json"]
    sample.main([f"--nanogpt={checkout}", *words])
    results = json.loads((workplace / "results.json").read_text())
    theirs = {"transformers", "transformers, static cache", "nanoGPT"}
    assert set(results["batch 8"]) == {"nanolm", *theirs}
    assert all(speed > 0 for speed in results["batch 1"].values())


def test_the_benchmark_of_encoders_runs(monkeypatch, workplace):
    write_texts_of_tasks()
    monkeypatch.setitem(encoder.SHAPE, "n_layer", 1)
    monkeypatch.setattr(
        encoder, "choose_engine", lambda *args, **kw: train.Engine("cpu", "float32", compile=False)
    )
    prepare("kinds", task="classification", inputs=("kinds.csv",), tokenizer="bpe:270")
    encoder.main(["--dataset=kinds", "--batch_size=16", "--repeats=1", "--json=results.json"])
    results = json.loads((workplace / "results.json").read_text())
    assert results["nanolm"]["tokens/s"] > 0
    assert {"transformers, the same batches", "transformers, shuffled batches"} < set(results)


def test_the_benchmark_of_answers_runs(monkeypatch, workplace, capsys):
    uncompiled = train.Engine("cpu", "float32", compile=False)
    monkeypatch.setattr(answers, "choose_engine", lambda *args, **kw: uncompiled)
    pairs = [f"{i} owls and {i % 7} foxes\t{i} birds{' met' * (i % 5)}" for i in range(60)]
    (workplace / "pairs.tsv").write_text("\n".join(pairs))
    prepare("pairs", task="completion", inputs=("pairs.tsv",), tokenizer="bpe:270")
    words = ["--dataset=pairs", "--chats=pairs", "--updates=2", "--repeats=1", "--n_layer=1"]
    words += ["--n_head=1", "--n_embd=8", "--block_size=64", "--batch_size=2"]
    answers.main([*words, "--batch_tokens=200", "--json=results.json"])
    results = json.loads((workplace / "results.json").read_text())
    assert all(row["updates/s"] > 0 for row in results["updates"].values())
    assert {"transformers, the same batches", "transformers, shuffled batches"} < set(
        results["updates"]
    )
    empty = [row["padding"] for row in results["packing"].values()]
    assert empty[0] < min(empty[2:])
    assert empty[1] <= empty[2] < empty[3]
    assert "updates of" in capsys.readouterr().out


def test_chunks_take_less_memory_than_all_logits():
    """As the benchmark measures it, each in a process of its own."""
    code = "from benchmarks import memory; memory.VOCABULARY, memory.CHANNELS = 20_011, 96; "
    code += "memory.main(['--way={}'])"
    peaks = {}
    for way in memory.WAYS:
        words = [sys.executable, "-c", code.format(way)]
        out = subprocess.run(words, cwd=memory.ROOT, check=True, capture_output=True).stdout
        peaks[way] = float(out)
    assert peaks["in chunks"] < peaks["all logits"] / 3


def test_the_benchmark_of_the_time_to_a_loss_runs(monkeypatch, checkout, workplace, capsys):
    (workplace / "text.txt").write_text("to be or not to be, that is the question\n" * 300)
    prepare("text", inputs=["text.txt"], tokenizer="char")
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=4"]
    config = str(time_to_loss.ROOT / "config" / "shakespeare_cpu.py")
    found = time_to_loss.nanolm_run([config, "--dataset=text", *shape], 9.0)
    assert found["reached"] < found["seconds"]
    assert found["loss"] < 9.0
    dataset = time_to_loss.find_dataset("text")
    theirs = time_to_loss.nanogpt_run(checkout, dataset, time_to_loss.CPU_RUN)
    assert theirs["seconds"] > 0
    assert 2 < theirs["loss"] < 9
    (checkout / "train.py").write_text("VOCABULARY = 50304\n" + TRAIN)
    with pytest.raises(ValueError, match="has 50304 tokens and the dataset 15: no fair contest"):
        time_to_loss.nanogpt_run(checkout, dataset, time_to_loss.CPU_RUN)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train", ["--nanogpt=nowhere"], "error: nowhere is no checkout of nanoGPT"),
        ("time_to_loss", ["--nanogpt=nowhere"], "error: nowhere is no checkout of nanoGPT"),
        ("sample", ["--repeats=0"], "--repeats: 0: must be at least 1"),
        ("sample", ["--device=tpu"], "error: device='tpu': choose"),
        ("memory", ["--json=nowhere/results.json"], "there is no folder nowhere"),
    ],
)
def test_a_bad_word_is_one_line_before_any_work(name, words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as end:
        compare.run_benchmark(importlib.import_module(f"benchmarks.{name}").main)
    said = f"{end.value.code}\n{capsys.readouterr().err}"
    assert message in said


def test_layouts_are_measured_beside_what_is_planned(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layouts, "LAYOUTS", {"one": (1, {}), "shards": (2, {"shard": True})})
    keys = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "block_size": 8}
    layouts.main([f"--json={tmp_path / 'x.json'}", f"--keys={json.dumps(keys)}", "--updates=2"])
    results = json.loads((tmp_path / "x.json").read_text())
    assert [len(results[layout]) for layout in ("one", "shards")] == [1, 2]
    assert all(each["rate"] > 0 for each in results["shards"])
    assert "planned" in capsys.readouterr().out
