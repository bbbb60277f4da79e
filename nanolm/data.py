"""Token files on disk, and batches as a pure function of the step.

A dataset is a folder: train.bin and val.bin hold token ids one after another, little-endian and
unsigned, in the narrowest type that holds the vocabulary; nanolm_tokenizer.json says what they
mean; meta.json counts and fingerprints them, and is the folder's seal: without it there is no
dataset.

Batches need no loader and no state. An epoch cuts the training tokens into windows of block_size
that do not overlap, from an offset drawn anew for each epoch (windows at fixed places would always
show the model the same beginnings), and shuffles them; both draws depend on (seed, epoch) alone.
Micro-batch i of a run is then the i-th group of batch_size windows in this endless sequence,
whoever asks, whenever.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanolm.corpus import KNOWN_DATASETS, Corpus, text_files
from nanolm.files import sha256, whole_folder, write_text
from nanolm.tokenizer import CharTokenizer, load_tokenizer

FORMAT = 1  # of meta.json
SEAL, TOKENIZER_FILE = "meta.json", "nanolm_tokenizer.json"
SPLITS = ("train", "val")
DATA_DIR = Path("data")
NO_TARGET = -1  # a target where there is no loss

TOKENIZERS = {CharTokenizer.kind: CharTokenizer.train}


@dataclass(frozen=True)
class Dataset:
    """An open dataset: memory-mapped ids, their tokenizer, and what meta.json says."""

    folder: Path
    train: np.ndarray
    val: np.ndarray
    tokenizer: CharTokenizer
    meta: dict

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that stand behind a token of the validation split, on average."""
        return self.meta["val"]["bytes"] / self.meta["val"]["tokens"]


# ------------------------------------------------------------------------------------------
# Preparing


def prepare(
    name: str,
    *,
    inputs: tuple[str, ...] = (),
    tokenizer: str | None = None,
    val_fraction: float = 0.1,
) -> Path:
    """Make the dataset data/<name> from the input files, or a known one from its own source.

    Returns its folder. Raises ValueError or FileNotFoundError, and leaves what was there, on bad
    input.
    """
    folder = dataset_folder(name)
    known = KNOWN_DATASETS.get(name)
    if known and inputs:
        raise ValueError(
            f"{name!r} is a known dataset with a text of its own: give yours another name"
        )
    if not known and not inputs:
        raise ValueError(
            f"unknown dataset {name!r}: give its text with --input PATH, or choose one of "
            f"{', '.join(KNOWN_DATASETS)}"
        )
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    kind = tokenizer or (known.tokenizer if known else CharTokenizer.kind)
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer={kind!r}: choose one of {', '.join(TOKENIZERS)}")
    corpus = known.corpus(folder) if known else text_files(inputs)
    write_dataset(folder, corpus, TOKENIZERS[kind](corpus.documents()), val_fraction=val_fraction)
    return folder


def dataset_folder(name: str) -> Path:
    """data/<name>. Raises ValueError where the name could be a path."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"dataset name {name!r}: use letters, digits, '_', '-' and '.'; it names a folder in "
            f"{DATA_DIR}/, and the text to read is given with --input PATH"
        )
    return DATA_DIR / name


def write_dataset(
    folder: Path, corpus: Corpus, tokenizer: CharTokenizer, *, val_fraction: float
) -> None:
    """Encode a corpus into a dataset folder, whole or not at all.

    The validation split is the last val_fraction of the tokens. Raises ValueError for a text so
    short that a split would have no token to predict.
    """
    dtype = narrowest_dtype(tokenizer.vocab_size)
    parts = [np.array(tokenizer.encode(text), dtype) for text in corpus.documents() if text]
    tokens = np.concatenate([np.empty(0, dtype), *parts])
    cut = int(len(tokens) * (1 - val_fraction))
    if cut < 2 or len(tokens) - cut < 2:
        raise ValueError(
            f"{'text too short' if parts else 'empty text'} in {corpus.source}: {cut} tokens to "
            f"train on, {len(tokens) - cut} to validate; each split needs 2, so give more --input"
        )
    with whole_folder(folder, seal=SEAL) as scratch:
        meta = {
            "format": FORMAT,
            "source": corpus.source,
            "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.str,
        }
        token_bytes = np.array(
            [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
        )
        for split, part in zip(SPLITS, (tokens[:cut], tokens[cut:]), strict=True):
            path = scratch / f"{split}.bin"
            part.tofile(path)
            size = int(token_bytes[part].sum())
            meta[split] = {"tokens": len(part), "bytes": size, "sha256": sha256(path)}
        tokenizer.save(scratch / TOKENIZER_FILE)
        write_text(scratch / SEAL, json.dumps(meta, indent=2) + "\n")


def narrowest_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds ids 0 .. vocab_size - 1."""
    return np.min_scalar_type(max(0, vocab_size - 1)).newbyteorder("<")


# ------------------------------------------------------------------------------------------
# Opening


def open_dataset(name: str) -> Dataset:
    """Open data/<name>; a known dataset that is not there yet is prepared first.

    Raises FileNotFoundError where there is none, ValueError where its files do not fit together.
    """
    folder = dataset_folder(name)
    if not (folder / SEAL).exists():
        if name not in KNOWN_DATASETS:
            raise FileNotFoundError(
                f"no dataset in {folder}: make it with python prepare.py {name} --input PATH"
            )
        prepare(name)
    again = f"prepare it again: {prepare_command(name)}"
    meta = read_meta(folder, again)
    known = KNOWN_DATASETS.get(name)
    if known and meta["tokenizer"] != known.tokenizer:
        raise ValueError(
            f"{folder} was made with the tokenizer {meta['tokenizer']!r}, and {name} goes with "
            f"{known.tokenizer!r}: {again}"
        )
    dtype = np.dtype(meta["dtype"])
    for split in SPLITS:
        path, size = folder / f"{split}.bin", meta[split]["tokens"] * dtype.itemsize
        actual = path.stat().st_size if path.exists() else "no"
        if actual != size:
            raise ValueError(f"{path} holds {actual} bytes and {SEAL} says {size}: {again}")
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise ValueError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.vocab_size} tokens and {SEAL} says "
            f"{meta['vocab_size']}: {again}"
        )
    train, val = (np.memmap(folder / f"{split}.bin", dtype, mode="r") for split in SPLITS)
    return Dataset(folder, train, val, tokenizer, meta)


def read_meta(folder: Path, way_out: str) -> dict:
    """meta.json, its fields checked. Raises ValueError, ending in way_out."""
    path = folder / SEAL
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        counts = [meta[split][key] for split in SPLITS for key in ("tokens", "bytes")]
        right = meta["format"] == FORMAT and all(isinstance(n, int) and n > 0 for n in counts)
        right = right and np.dtype(meta["dtype"]) == narrowest_dtype(meta["vocab_size"])
        texts = [meta["tokenizer"], meta["source"], *(meta[split]["sha256"] for split in SPLITS)]
        right = right and all(isinstance(text, str) for text in texts)
    except (ValueError, TypeError, KeyError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path} is damaged or of another version of nanolm; {way_out}")
    return meta


def prepare_command(name: str) -> str:
    return f"python prepare.py {name}" + ("" if name in KNOWN_DATASETS else " --input PATH")


def check_dataset(name: str) -> dict:
    """Open data/<name> and compare its files with their fingerprints; returns meta.json."""
    if not (dataset_folder(name) / SEAL).exists():
        raise FileNotFoundError(
            f"no dataset in {dataset_folder(name)}: {prepare_command(name)} makes it"
        )
    dataset = open_dataset(name)
    for split in SPLITS:
        path = dataset.folder / f"{split}.bin"
        if sha256(path) != dataset.meta[split]["sha256"]:
            raise ValueError(
                f"{path} has changed since it was prepared (its sha256 differs from {SEAL}): "
                f"prepare it again: {prepare_command(name)}"
            )
    return dataset.meta


# ------------------------------------------------------------------------------------------
# Batches


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """How many windows of block_size inputs, each with its targets, an epoch cuts out of n_tokens.

    One fewer than fit, which leaves room to shift them all by up to a window: 11 tokens hold three
    windows of 3, and an epoch takes two. Raises ValueError where not even one fits.
    """
    if n_tokens < block_size + 1:
        raise ValueError(
            f"text too short for block_size={block_size}: a window needs {block_size + 1} tokens "
            f"and there are {n_tokens}; choose a smaller block_size, or prepare more text"
        )
    return max(1, (n_tokens - 1) // block_size - 1)


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order in which they are seen."""
    n = windows_per_epoch(n_tokens, block_size)
    random = np.random.default_rng((seed, epoch))
    offset = random.integers(n_tokens - n * block_size)  # so that the last window can end the text
    return offset + block_size * random.permutation(n)


def training_batch(
    tokens: np.ndarray, index: int, *, batch_size: int, block_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Micro-batch number index of a run.

    Ids and their targets, the next ids, (B, T) int64 each.
    """
    n = windows_per_epoch(len(tokens), block_size)
    numbers = range(index * batch_size, (index + 1) * batch_size)
    starts = [epoch_starts(len(tokens), block_size, seed, i // n)[i % n] for i in numbers]
    windows = tokens[np.add.outer(starts, np.arange(block_size + 1))].astype(
        np.int64
    )  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def evaluation_batches(
    tokens: np.ndarray, *, batch_size: int, block_size: int, n_batches: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fixed windows that never overlap: all, or n_batches batches spread evenly over the split.

    Yields ids and targets, (B, T) int64 each. The whole split predicts each token but the first
    exactly once: what is missing in the last window and in the last batch is filled up with
    NO_TARGET.
    """
    starts = np.arange(0, len(tokens) - 1, block_size)
    if 0 < n_batches * batch_size < len(starts):
        chosen = np.arange(n_batches * batch_size) * len(starts) // (n_batches * batch_size)
        starts = starts[chosen]
    for first in range(0, len(starts), batch_size):
        ids = np.zeros((batch_size, block_size), np.int64)
        targets = np.full((batch_size, block_size), NO_TARGET, np.int64)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + block_size + 1]
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield ids, targets


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError where an id has no embedding, before a GPU fails without a word."""
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"token id {ids.max()} is outside the vocabulary of {vocab_size}: the dataset is "
            "damaged; prepare it again with prepare.py"
        )
