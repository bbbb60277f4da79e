"""nanolm's tokenizer against its peers: minbpe, tiktoken, Hugging Face's tokenizers.

    python -m benchmarks.tokenizer --minbpe=DIR

DIR is a checkout of github.com/karpathy/minbpe; without it, that peer is left out. Learning 256
merges takes minbpe minutes a turn.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarks.compare import arguments, contest, run_benchmark, write
from nanolm.bpe import GPT2_SPLIT, learn_merges, split
from nanolm.system.workers import n_cores
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.known import tiny_shakespeare

ROOT = Path(__file__).resolve().parent.parent
SMALL, MIDDLE, LARGE = 256 + 256, 8192, 32768  # sizes of a vocabulary
LARGE_TEXT, FILE = 60_000_000, 200_000_000  # bytes


def sources(size: int) -> Iterator[str]:
    """The standard library's source files, again and again, up to size characters."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if "packages" not in str(file)]
    while True:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")[:size]
            yield text
            size -= len(text)
            if size <= 0:
                return


def rust_trainer(texts: list[str] | Iterator[str], vocab_size: int) -> Tokenizer:
    """Hugging Face's trainer of byte-level BPE, with GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training(text: str, minbpe: type | None, repeats: int) -> dict:
    """Learning merges."""
    small = {"nanolm": lambda: BPETokenizer.train([text], SMALL, special_tokens=())}
    if minbpe:
        small["minbpe"] = lambda: minbpe(GPT2_SPLIT).train(text, SMALL)
    middle = {
        "nanolm": lambda: BPETokenizer.train([text], MIDDLE),
        "tokenizers (Rust)": lambda: rust_trainer([text], MIDDLE),
    }
    large = {
        "nanolm": lambda: BPETokenizer.train(sources(LARGE_TEXT), LARGE),
        "tokenizers (Rust)": lambda: rust_trainer(sources(LARGE_TEXT), LARGE),
    }
    size = f"{len(text):,} characters"
    return {
        "train_small": contest(f"{SMALL} tokens from {size}", small, repeats=repeats),
        "train_middle": contest(f"{MIDDLE} tokens from {size}", middle, repeats=repeats),
        "train_large": contest(
            f"{LARGE} tokens from {LARGE_TEXT:,} characters", large, repeats=repeats
        ),
    }


def encoding(text: str, minbpe: type | None, repeats: int) -> dict:
    """Encoding a text with the same merges."""
    tokenizer = BPETokenizer.train([text], MIDDLE, special_tokens=())
    bare = tiktoken.Encoding(
        "bare", pat_str=GPT2_SPLIT, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    runs = {
        "nanolm": lambda: tokenizer.encode(text),
        "tiktoken": lambda: bare.encode_ordinary(text),
    }
    ids = [run() for run in runs.values()]
    assert ids[0] == ids[1]
    result = contest(f"encoding {len(text):,} characters", runs, repeats=10 * repeats)
    if minbpe:
        other = minbpe(GPT2_SPLIT)
        merges = list(learn_merges(Counter(split(text, GPT2_SPLIT)), MIDDLE - 256))
        other.merges = {pair: 256 + i for i, pair in enumerate(merges)}
        assert other.encode_ordinary(text[:10_000]) == tokenizer.encode(text[:10_000])
        runs = {"nanolm": runs["nanolm"], "minbpe": lambda: other.encode_ordinary(text)}
        result |= contest("the same", runs, repeats=repeats)
    return {"encode": result}


def preparing(tokenizer: BPETokenizer) -> dict:
    """Preparing a large file by as many threads as there are cores: time, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        with open(Path(folder) / "large.txt", "w", encoding="utf-8") as file:
            file.writelines(sources(FILE))
        size = (Path(folder) / "large.txt").stat().st_size / 1e6
        start = time.perf_counter()
        command = [sys.executable, ROOT / "prepare.py", "large", "--input", "large.txt"]
        command += ["--tokenizer=tokenizer.json"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        peak = peak_memory(process)
        assert process.returncode == 0
        speed = size / (time.perf_counter() - start)
    print(
        f"preparing {size:.0f} MB on {n_cores()} cores: {speed:.1f} MB/s, {peak:.0f} MB of memory",
        flush=True,
    )
    return {"prepare": {"MB/s": speed, "peak MB": peak}}


def peak_memory(process: subprocess.Popen) -> float:
    """The highest resident memory of a process, in MB (Linux)."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    return peak / 1e6


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--minbpe", type=Path, help="a checkout of minbpe")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    minbpe = None
    if options.minbpe:
        sys.path.insert(0, str(options.minbpe))
        from minbpe import RegexTokenizer as minbpe
    folder = Path("data/shakespeare_char")
    text = "".join(tiny_shakespeare(folder).texts("reading"))
    results = encoding(text, minbpe, options.repeats)
    results |= preparing(BPETokenizer.train([text], MIDDLE))
    results |= training(text, minbpe, options.repeats)
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
