"""The table of bad input: one line that names the value and the way out, and nothing changed."""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

TRAIN = ("train", *TINY, "--out_dir=out/new")
RESUME = ("train", *TINY, "--out_dir=out/tiny", "--init_from=resume", "--max_iters=6")
SAMPLE = ("sample", "--out_dir=out/tiny", "--device=cpu", "--dtype=float32", "--num_samples=1")


LINES = ("--input=text.txt",)
BY_BLEU = ("--task=completion", "--best_by=bleu")
MIXED = ("prepare", "new", "--task=completion", "--input", "a.jsonl", "--val_input", "b.jsonl")


def pairs_and_chats() -> None:
    write("a.jsonl", '{"prompt": "p", "completion": "a"}\n')()
    write("b.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n')()


def nothing() -> None:
    """The place is as the fixture tiny_run leaves it: text.txt, data/tiny, out/tiny."""


def write(path: str, content: str | bytes = b"") -> Callable[[], None]:
    def do() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def folder(path: str) -> Callable[[], None]:
    return lambda: Path(path).mkdir(parents=True)


def remove(pattern: str) -> Callable[[], None]:
    return lambda: [path.unlink() for path in Path().glob(pattern)]


def change(pattern: str, edit: Callable[[bytes], bytes]) -> Callable[[], None]:
    """Edit the bytes of each file of the pattern; hard links to it stay as they are."""

    def do() -> None:
        assert list(Path().glob(pattern))
        for path in Path().glob(pattern):
            edited = edit(path.read_bytes())
            path.unlink()
            path.write_bytes(edited)

    return do


def meta(**fields: object) -> Callable[[], None]:
    """Change fields of the tiny dataset's meta.json; None takes one away."""

    def edit(data: bytes) -> bytes:
        content = json.loads(data) | fields
        return json.dumps({k: v for k, v in content.items() if v is not None}).encode()

    return change("data/tiny/meta.json", edit)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def capitals(data: bytes) -> bytes:
    """A tokenizer of characters with others in place of some."""
    return data.replace(b"w", b"W")


def other_text(text: str) -> Callable[[], None]:
    """Another dataset, data/other, of the text."""

    def do() -> None:
        from nanolm.runs.prepare import prepare

        write("other.txt", text)()
        prepare("other", inputs=("other.txt",))

    return do


@dataclass
class Row:
    """One mistake: what is there, what is typed, and words that the answer holds."""

    name: str
    setup: Callable[[], None]
    command: tuple[str, ...]
    words: tuple[str, ...]
    marks: tuple = ()
    environment: tuple[tuple[str, str], ...] = ()


def row(name, setup, command, *words, **more):
    return Row(name, setup, tuple(command), words, **more)


def train(*words: str) -> tuple[str, ...]:
    return (*TRAIN, *words)


def prepare_text(*words: str) -> tuple[str, ...]:
    return ("prepare", "new", "--input", "new.txt", *words)


def tokenizer(spec: str) -> tuple[str, ...]:
    return prepare_text(f"--tokenizer={spec}")


def kinds(*rows: str):
    return write("kinds.csv", "\n".join(("text,label", *rows, "")))


def world(size: str) -> tuple[tuple[str, str], ...]:
    return (("WORLD_SIZE", size),)


AGAIN = "prepare it again"
KINDS = ("prepare", "new", "--task=classification", "--input=kinds.csv")
TAGS = ("prepare", "new", "--task=tagging", "--input=t.conll")
VAL = (*KINDS, "--val_input=b.csv")
OVER_TINY = ("prepare", "tiny", "--input", "new.txt")
AGAIN_FROM = ("train", *TINY, "--out_dir=out/tiny", "--overwrite=true")
ALL = train("--gradient_accumulation_steps=2", "--backend=nccl")
TOKENS = "data/tiny/nanolm_tokenizer.json"
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
no_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is not None, reason="wandb is installed"
)
some_text = write("new.txt", "abc" * 9)

ROWS = [
    # keys and values
    row("unknown key", nothing, train("--n_layers=2"), "'n_layers'", "did you mean n_layer"),
    row("wrong type", nothing, train("--n_layer=two"), "n_layer='two'", "whole number"),
    row("no value", nothing, train("--n_layer"), "--n_layer: expected one argument"),
    row("batch_size", nothing, train("--batch_size=-1"), "batch_size=-1", "at least 1"),
    row("block_size", nothing, train("--block_size=0"), "block_size=0", "at least 1"),
    row("max_iters", nothing, train("--max_iters=-1"), "max_iters=-1", "at least 0"),
    row("not finite", nothing, train("--learning_rate=nan"), "learning_rate=nan", "finite"),
    row("learning rate", nothing, train("--learning_rate=0"), "learning_rate=0", "above 0"),
    row("beta1", nothing, train("--beta1=1"), "beta1=1", "below 1"),
    row("dropout", nothing, train("--dropout=1.5"), "dropout=1.5", "below 1"),
    row("heads", nothing, train("--n_head=3"), "n_embd=8", "n_head=3", "change one"),
    row("rates", nothing, train("--min_lr=1"), "min_lr=1.0", "at most learning_rate"),
    row("memory", nothing, train("--n_embd=10000000"), "out of memory", "model smaller"),
    row("more memory", nothing, train("--n_embd=10000000000000"), "out of memory", "smaller"),
    row("norm", nothing, train("--norm=batch"), "norm='batch'", "layer, rms"),
    row("optimizer", nothing, train("--optimizer=magic"), "optimizer='magic'", "adamw"),
    row("schedule", nothing, train("--schedule=magic"), "schedule='magic'", "cosine, trapezoid"),
    row("vocabulary", nothing, train("--vocab_size=7"), "vocab_size=7", "leave this key out"),
    # config files
    row("code", write("a.py", "n_layer = int(3)\n"), train("a.py"), "a.py, line 1", "'int(3)'"),
    row("power", write("a.py", "\nn_layer = 2**3\n"), train("a.py"), "a.py, line 2", "+ - * / //"),
    row("syntax", write("a.py", "n_layer = (\n"), train("a.py"), "a.py, line 1", "key = value"),
    row("file key", write("a.py", "n_layr = 2\n"), train("a.py"), "a.py", "'n_layr'", "n_layer"),
    row("no file", nothing, train("a.py"), "no config file a.py"),
    row("huge number", write("a.py", f"min_lr = {10**400}\n"), train("a.py"), "min_lr"),
    # machines
    row("device", nothing, train("--device=tpu"), "device='tpu'", "cpu, cuda"),
    row("cuda", nothing, train("--device=cuda"), "device='cuda'", "device=auto", marks=(no_cuda,)),
    row("dtype", nothing, train("--dtype=int8"), "dtype='int8'", "float32, bfloat16"),
    row("compile", nothing, train("--compile=maybe"), "compile='maybe'", "auto, True or False"),
    row("ranks", nothing, TRAIN, "2 processes", "multiple of 2", environment=world("2")),
    row("none", nothing, TRAIN, "WORLD_SIZE=0", "from 0", environment=world("0")),
    row("no ranks", nothing, TRAIN, "WORLD_SIZE='two'", "torchrun", environment=world("two")),
    row(
        "nccl", nothing, ALL, "'nccl'", "--backend=auto", environment=world("2"), marks=(no_cuda,)
    ),
    row("backend", nothing, train("--backend=mpi"), "backend='mpi'", "auto, nccl, gloo"),
    row("wandb", nothing, train("--wandb_log"), "wandb_log", "pip install", marks=(no_wandb,)),
    # making a dataset
    row("no name", nothing, ("prepare",), "NAME is missing", "--help"),
    row("two names", nothing, ("prepare", "a", "b"), "only NAME goes before", "--input"),
    row("name ../x", nothing, ("prepare", "../x", "--input", "text.txt"), "'../x'", "--input"),
    row("name a/b", nothing, ("prepare", "a/b", "--input", "text.txt"), "'a/b'", "letters"),
    row("no text", nothing, ("prepare", "new"), "'new'", "--input PATH", "pydocs"),
    row("two texts", nothing, ("prepare", "pydocs", "--input", "text.txt"), "another name"),
    row("no input", nothing, prepare_text(), "new.txt: no such file", "--input"),
    row("empty folder", folder("new.txt"), prepare_text(), "new.txt: no .txt", "one by one"),
    row("empty text", write("new.txt"), prepare_text(), "empty text"),
    row("short text", write("new.txt", "abc"), prepare_text(), "too short", "each split needs 2"),
    row("not UTF-8", write("new.txt", b"ab\xff"), prepare_text(), "new.txt", "byte 2", "convert"),
    row(
        "bad line",
        write("new.txt/a.jsonl", "{}"),
        prepare_text(),
        "a.jsonl, line 1",
        '"text"',
        "--text_key",
    ),
    row("empty input", nothing, ("prepare", "new", "--input="), "--input is empty"),
    row("no stdin", nothing, ("prepare", "new", "--input", "-"), "empty text in standard input"),
    row("no hub", nothing, ("prepare", "new", "--input", "hf:no/such/folder"), "no/such/folder"),
    row("tokenizer", some_text, tokenizer("magic"), "'magic'", "char, bpe:N"),
    row("empty tokenizer", some_text, tokenizer(""), "tokenizer=''", "char, bpe:N"),
    row("bpe no number", some_text, tokenizer("bpe:abc"), "'bpe:abc'", "char, bpe:N"),
    row("bpe below 0", some_text, tokenizer("bpe:-5"), "'bpe:-5'", "char, bpe:N"),
    row("bpe 0", some_text, tokenizer("bpe:0"), "vocab_size=0", "at least 257"),
    row("bpe too small", some_text, tokenizer("bpe:256"), "vocab_size=256", "at least 257"),
    row("no tokenizer", some_text, tokenizer("new.txt"), "new.txt", "no tokenizer", "another"),
    row("no tokenizer in", some_text, tokenizer("data"), "data/nanolm_tokenizer.json", "another"),
    row("foreign", write("new.txt", "\u20ac" * 9), tokenizer("data/tiny"), "'\u20ac'", "use only"),
    row("learn 0", some_text, prepare_text("--tokenizer_bytes=0"), "tokenizer_bytes=0", "least 1"),
    row(
        "fraction 0",
        write("new.txt", "a" * 99),
        prepare_text("--val_fraction=0"),
        "--val_input=FILE",
    ),
    row("fraction 1", write("new.txt", "a" * 99), prepare_text("--val_fraction=1"), "below 1"),
    row("no label", kinds("a,"), KINDS, "kinds.csv, line 2", "the label is ''"),
    row("one class", kinds("a,x", "b,x"), KINDS, "one label", "'x'"),
    row("columns", write("t.conll", "a X\nb\n"), TAGS, "t.conll, line 2", "1 columns"),
    row("labels", kinds(*(f"a,{i}" for i in range(5000))), KINDS, "5,000 labels", "1,000"),
    row("no words", kinds(" ,x"), KINDS, "kinds.csv, line 2", "a text is needed"),
    row("unseen label", write("b.csv", "text,label\na,x\n"), VAL, "b.csv, line 2", "label 'x'"),
    row("few texts", kinds("a,x", "b,y"), KINDS, "2 examples are too few", "--val_input"),
    row("no labels", nothing, ("prepare", "new", "--task=tagging"), "'new'", "--input"),
    row("task", some_text, prepare_text("--task=x"), "task='x'", "classification"),
    row("known task", nothing, ("prepare", "pydocs", "--task=tagging"), "choose causal"),
    row("text for a task", nothing, train("--task=tagging"), "prepared for 'causal'", "--dataset"),
    row("score", nothing, train("--best_by=f1"), "best_by='f1'", "loss"),
    row("mixed", pairs_and_chats, MIXED, "b.jsonl, line 1", "do not mix", "a.jsonl, line 1"),
    row("no answers", nothing, train(*BY_BLEU, "--eval_answers=0"), "'bleu'", "at least 1"),
    row("start_id", nothing, train("--n_encoder_layer=1", "--start_id=99"), "start_id=99"),
    row("no mask", nothing, train("--task=masked"), "<|mask|>", "--tokenizer=bpe"),
    row("other text", some_text, OVER_TINY, "text.txt there and new.txt here", "--overwrite=true"),
    row("worse text", write("new.txt"), (*OVER_TINY, "--overwrite=true"), "empty text"),
    row("check nothing", nothing, ("prepare", "new", "--check"), "data/new", "prepare.py new"),
    row("flip", change("data/tiny/train.bin", flip), ("prepare", "tiny", "--check"), AGAIN),
    row("flip val", change("data/tiny/val.bin", flip), ("prepare", "tiny", "--check"), AGAIN),
    row("other tokens", change(TOKENS, capitals), ("prepare", "tiny", "--check"), TOKENS, AGAIN),
    row("name taken", write("data/new", b"a file"), prepare_text("--input", "text.txt"), "new"),
    # opening a dataset
    row("no dataset", nothing, train("--dataset=no"), "data/no", "prepare.py no --input", "tiny"),
    row("unnamed", nothing, train("--dataset=openwebtext"), "key dataset", "tiny", "pydocs"),
    row("dataset ../x", nothing, train("--dataset=../x"), "'../x'", "letters"),
    row("dataset a/b", nothing, train("--dataset=a/b"), "'a/b'", "letters"),
    row("long block", nothing, train("--block_size=99999"), "block_size=99999", "smaller"),
    row("short train.bin", change("data/tiny/train.bin", lambda b: b[:-1]), TRAIN, AGAIN),
    row("long val.bin", change("data/tiny/val.bin", lambda b: b + b"0"), TRAIN, "val.bin", AGAIN),
    row("no train.bin", remove("data/tiny/train.bin"), TRAIN, "train.bin", AGAIN),
    row("ids", change("data/tiny/*.bin", lambda b: b"\xff" * len(b)), TRAIN, "255", "vocabulary"),
    row("meta garbage", write("data/tiny/meta.json", b"\xff{"), TRAIN, "meta.json", AGAIN),
    row("meta list", write("data/tiny/meta.json", "[]"), TRAIN, "meta.json", AGAIN),
    row("meta format", meta(format=99), TRAIN, "meta.json", AGAIN),
    row("tokens", write(TOKENS, "{"), TRAIN, "tokenizer", "again"),
    row("no tokens", remove(TOKENS), TRAIN, "tokenizer", "again"),
    # runs
    row("below a file", nothing, train("--out_dir=text.txt/a"), "'text.txt/a'", "--out_dir"),
    row("is a file", nothing, train("--out_dir=text.txt"), "out_dir='text.txt'", "--out_dir"),
    row("start", nothing, train("--init_from=gpt9"), "init_from='gpt9'", "scratch, resume"),
    row("two starts", nothing, train("--pretrained=gpt2"), "pretrained='gpt2'", "=auto"),
    row("start nameless", nothing, train("--init_from="), "init_from=''", "scratch, resume"),
    row("pretrained", write("a/config.json"), train("--out_dir=a"), "out_dir='a'", "of its own"),
    row("start empty", folder("a"), train("--init_from=a"), "a", "no", "train"),
    row("resume nothing", nothing, train("--init_from=resume"), "out/new", "train there first"),
    row("resume empty", folder("out/new"), train("--init_from=resume"), "out/new", "first"),
    row("over a run", nothing, ("train", *TINY, "--out_dir=out/tiny"), "out/tiny", "=resume"),
    row("other model", nothing, (*RESUME, "--n_layer=2"), "n_layer is 1 there and 2 here"),
    row("wider model", nothing, (*RESUME, "--n_embd=16"), "8 there and 16 here; continue it as"),
    row("damaged", change("out/tiny/*.pt", flip), RESUME, "out/tiny", "damaged"),
    row("cut off", change("out/tiny/*.pt", lambda b: b[:99]), RESUME, "no sound", "--out_dir"),
    row("lost tokens", remove("out/tiny/*tokenizer*"), RESUME, "has lost its", "data/tiny"),
    row("itself", nothing, (*AGAIN_FROM, "--init_from=out/tiny"), "also the out_dir", "=resume"),
    row(
        "step folder", folder("out/tiny/step_7.pt"), AGAIN_FROM, "step_7.pt is a folder", "remove"
    ),
    row("log folder", folder("out/new/metrics.jsonl"), TRAIN, "is a folder", "remove it first"),
    row(
        "other tokens", other_text("xyz" * 99), (*RESUME, "--dataset=other"), "choose the dataset"
    ),
    # sampling
    row("no run", folder("a"), ("sample", "--out_dir=a"), "a holds no model", "train.py"),
    row("no runs", remove("out/*/*.pt"), ("sample",), "no run in out/", "train.py", "--out_dir"),
    row("no best", remove("out/*/*.pt"), SAMPLE, "out/tiny holds no model"),
    row("all damaged", change("out/tiny/*.pt", flip), SAMPLE, "no sound checkpoint"),
    row("prompt", nothing, (*SAMPLE, "--start=a\u20ac"), "'\u20ac'", "use only"),
    row("no prompt", nothing, (*SAMPLE, "--start="), "there is no text", "at least one"),
    row("prompt file", nothing, (*SAMPLE, "--start=FILE:a.txt"), "FILE:a.txt", "no such file"),
    row("temperature", nothing, (*SAMPLE, "--temperature=-1"), "temperature=-1", "at least 0"),
    row("top_p", nothing, (*SAMPLE, "--top_p=0"), "top_p=0", "above 0"),
    row("top_k", nothing, (*SAMPLE, "--top_k=-3"), "top_k=-3", "at least 1"),
    row("num_samples", nothing, (*SAMPLE, "--num_samples=0"), "num_samples=0", "at least 1"),
    row("length", nothing, (*SAMPLE, "--max_new_tokens=-1"), "max_new_tokens=-1", "at least 0"),
    row("beams", nothing, (*SAMPLE, "--num_beams=2"), "num_beams=2", "out/tiny"),
    row("drawn beams", nothing, (*SAMPLE, "--num_beams=2", "--temperature=1"), "leave out"),
    row("many beams", nothing, (*SAMPLE, "--num_beams=2000"), "num_beams=2000", "1 to 1000"),
    row("penalty", nothing, (*SAMPLE, "--length_penalty=1e9"), "length_penalty=1", "-10 to 10"),
    row("no lines", nothing, (*SAMPLE, "--input=a.txt"), "input='a.txt'", "no such file"),
    row("no place", nothing, (*SAMPLE, *LINES, "--output=a/b"), "output='a/b'", "no such folder"),
    row("same file", nothing, (*SAMPLE, *LINES, "--output=text.txt"), "'text.txt'", "the input"),
    row("output alone", nothing, (*SAMPLE, "--output=a"), "output='a'", "--input"),
    row("start and chat", nothing, (*SAMPLE, "--start=a", "--chat"), "give one"),
    row("sample device", nothing, (*SAMPLE, "--device=tpu"), "device='tpu'", "cpu, cuda"),
    row("sample key", nothing, (*SAMPLE, "--temprature=1"), "'temprature'", "temperature"),
]


def tree() -> dict[str, str]:
    """Every file and folder here, with the hash of its content."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in Path().rglob("*")
    }


@pytest.mark.parametrize(
    "row", [pytest.param(each, id=each.name.replace(" ", "-"), marks=each.marks) for each in ROWS]
)
def test_bad_input_is_answered_in_one_line_and_changes_nothing(
    row, tiny_run, run_main, monkeypatch
):
    for key, value in row.environment:
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("tempfile.TemporaryFile", io.BytesIO)  # which nobody needs to close
    row.setup()
    before = tree()
    code, out, err = run_main(*row.command)
    assert code == 2, out + err
    assert "Traceback" not in out + err
    assert [word for word in row.words if word not in err] == [], err
    assert tree() == before
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1


def test_in_an_empty_folder_nothing_is_made(workplace, run_main):
    """Not even data/ or out/, which the rows of the table find there."""
    Path("new.txt").touch()
    for command in (TRAIN, prepare_text(), ("sample",)):
        code, _, err = run_main(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert list(tree()) == ["new.txt"]


def test_no_parent_of_a_refused_run_is_left(tiny_run, run_main):
    before = tree()
    code, _, _ = run_main("train", *TINY, "--out_dir=deep/down/new", "--init_from=resume")
    assert code == 2
    assert tree() == before


# ------------------------------------------------------------------------------------------
# The scripts as the shell sees them


def test_the_shell_gets_one_line_or_help(workplace):
    commands = [["--n_layers=2"], ["--help"]]
    processes = [  # at once: each takes seconds to import torch
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in commands
    ]
    (_, refusal), (help_text, silence) = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [2, 0]
    assert refusal.startswith("error: unknown key 'n_layers': did you mean n_layer")
    assert refusal.count("\n") == 1
    assert "--n_layer" in help_text
    assert silence == ""
    assert list(workplace.iterdir()) == []
