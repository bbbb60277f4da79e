"""The benchmarks run, on work that is small; what they say is another matter."""

import json

import pytest

from benchmarks import compare, tokenizer
from nanolm.corpus import Corpus, documents


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
    assert results["prepare_1"]["peak MB"] == pytest.approx(100, rel=0.9)
    assert "tokenizers (Rust)" in capsys.readouterr().out
