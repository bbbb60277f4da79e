"""A dataset on disk: token ids, and what they mean.

A dataset is a folder: train.bin and val.bin hold token ids one after another, little-endian and
unsigned, in the narrowest type that holds the vocabulary; nanolm_tokenizer.json says what they
mean; meta.json counts and fingerprints them, and is the folder's seal: without it there is no
dataset.

Text streams through in bundles, which several threads encode, so that its size does not matter.
"""

import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanolm.system.files import json_of, naming, sha256, whole_folder, write_text
from nanolm.system.workers import in_order
from nanolm.text.corpus import Corpus
from nanolm.text.documents import Part
from nanolm.text.examples import Examples, file_length
from nanolm.text.known import KNOWN_DATASETS
from nanolm.text.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    existing,
    load_tokenizer,
)

FORMAT = 2  # of meta.json
TASK = "causal"  # what a dataset is for, unless it says otherwise
KINDS = (TASK, "classification", "tagging", "completion")  # what it may be for
SEAL = "meta.json"
SPLITS = ("train", "val")
DATA_DIR = Path("data")
BUNDLE = 2**20  # characters of text that a thread gets at once


@dataclass(frozen=True)
class Dataset:
    """An open dataset: memory-mapped ids, their tokenizer, and what meta.json says."""

    folder: Path
    train: np.ndarray | Examples
    val: np.ndarray | Examples
    tokenizer: Tokenizer
    meta: dict

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that stand behind a token of the validation split, on average."""
        return self.meta["val"]["bytes"] / self.meta["val"]["tokens"]


# ------------------------------------------------------------------------------------------
# Preparing


def dataset_folder(name: str) -> Path:
    """data/<name>. Raises ValueError where the name could be a path."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"dataset name {name!r}: use letters, digits, '_', '-' and '.'; it names a folder in "
            f"{DATA_DIR}/, and the text to read is given with --input PATH"
        )
    return DATA_DIR / name


def datasets() -> list[str]:
    """The names of the datasets that are prepared."""
    return sorted(path.parent.name for path in DATA_DIR.glob(f"*/{SEAL}"))


def write_dataset(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.0,
    val: Corpus | None = None,
    made_with: Mapping[str, Any] = {},
) -> None:
    """Encode a corpus into a dataset folder, whole or not at all.

    made_with: what was asked for, noted in meta.json.

    Each document stands between the tokenizer's begin_of_text and end_of_text, where it has them,
    and after the last one, too, another would begin. The validation split is val, or else the last
    val_fraction of the tokens. Raises ValueError for a text so short that a split would have no
    token to predict.
    """
    dtype = narrowest_dtype(tokenizer.vocab_size)
    facts = {"task": TASK, "made_with": made_with, "source": corpus.source}
    with new_dataset(folder, tokenizer, dtype, **facts) as (meta, *files):
        sizes = bytes_per_id(tokenizer)
        encode = partial(encode_parts, tokenizer=tokenizer, dtype=dtype)
        counts = Counter(files=0)
        for source, path in zip((corpus, val) if val else (corpus,), files, strict=False):
            write_array(np.array(existing(tokenizer.begin_of_text), dtype), path)
            counts.update(files=source.n_files, **encode_corpus(source, encode, path))
        del counts["tokens"]
        meta["read"] = dict(counts)
        if not val:
            cut = share_to_train(files[0].stat().st_size // dtype.itemsize, val_fraction)
            move_tail(*files, cut * dtype.itemsize)
        for split, path in zip(SPLITS, files, strict=True):
            size = sum(int(sizes[ids].sum()) for ids in read_ids(path, dtype))
            meta[split] = {"tokens": path.stat().st_size // dtype.itemsize, "bytes": size}
        check_lengths(meta, corpus.source)


def share_to_train(n: int, val_fraction: float) -> int:
    """How many of n tokens are to train on. Raises ValueError where the others are too few."""
    cut = int(n * (1 - val_fraction))
    if n >= 4 and not 2 <= cut <= n - 2:
        raise ValueError(
            f"val_fraction={val_fraction}: leaves {cut:,} of {n:,} tokens to train on, and each "
            f"split needs 2: choose {2 / n:.2g} to {1 - 2 / n:.6g}, or --val_input=FILE"
        )
    return cut


def check_lengths(meta: Mapping[str, Any], source: str) -> None:
    """Raise ValueError where a split would have no token to predict."""
    train, val = (meta[split]["tokens"] for split in SPLITS)
    if min(train, val) < 2:
        raise ValueError(
            f"{'text too short' if train + val else 'empty text'} in {source}: {train} tokens to "
            f"train on, {val} to validate; each split needs 2, so give more --input"
        )


@contextmanager
def new_dataset(
    folder: Path, tokenizer: Tokenizer, dtype: np.dtype, **facts: Any
) -> Iterator[tuple[dict[str, Any], Path, Path]]:
    """Fill a dataset folder, whole or not at all.

    Yields what meta.json will hold, to add the counts of the splits, and the two files to write.
    """
    meta = {"format": FORMAT, **facts}
    meta |= {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "dtype": dtype.str}
    with whole_folder(folder, seal=SEAL) as scratch:
        files = [scratch / f"{split}.bin" for split in SPLITS]
        yield meta, *files
        for split, path in zip(SPLITS, files, strict=True):
            meta[split]["sha256"] = sha256(path)
        tokenizer.save(scratch / TOKENIZER_FILE)
        meta["tokenizer_sha256"] = sha256(scratch / TOKENIZER_FILE)
        write_text(scratch / SEAL, json.dumps(meta, indent=2) + "\n")


def encode_corpus(
    corpus: Corpus, encode: Callable[[list[Part]], np.ndarray], path: Path
) -> dict[str, int]:
    """Add the ids of all documents to a file; returns how many of each there are."""
    counts = {"tokens": 0, "documents": 0, "separators": 0}
    lengths, written, read = deque(), 0, 0  # of bundles that are being encoded

    def counted() -> Iterator[list[Part]]:
        for bundle in bundles(corpus.read("encoding")):
            counts["documents"] += sum(part.last for part in bundle)
            counts["separators"] += sum(part.separated for part in bundle)
            lengths.append(sum(len(part.text) for part in bundle))
            yield bundle

    def needed() -> float:
        return written * max(1.0, (corpus.size or 0) / max(1, read))

    with naming(path, needed=needed), open(path, "ab") as file:
        for ids in in_order(encode, counted()):
            read += lengths.popleft()
            written += ids.nbytes
            file.write(ids.tobytes())
            counts["tokens"] += len(ids)
    return counts


def bundles(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in lists of about BUNDLE characters, so that short documents are encoded together."""
    bundle, size = [], 0
    for part in parts:
        bundle.append(part)
        size += len(part.text)
        if size >= BUNDLE:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def encode_parts(parts: Iterable[Part], *, tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    """The ids of consecutive parts; after each document it ends, and the next begins."""
    ids, between = [], existing(tokenizer.end_of_text, tokenizer.begin_of_text)
    for part in parts:
        try:
            ids += tokenizer.encode(part.text)
        except ValueError:
            blame_line(part, tokenizer)
            raise
        ids += between if part.last else []
    return np.array(ids, dtype)


def blame_line(part: Part, tokenizer: Tokenizer) -> None:
    """Raise ValueError for the first line of a part that has no ids, with its place."""
    for number, line in enumerate(part.text.split("\n"), start=part.line):
        try:
            tokenizer.encode(line)
        except ValueError as error:
            place = f"{part.where}, line {number}" if part.line else part.where
            raise ValueError(f"{place}: {error}" if place else str(error)) from None


def bytes_per_id(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text stand behind each id; none behind a special token."""
    sizes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    sizes[list(tokenizer.special_tokens.values())] = 0
    return sizes


def write_array(array: np.ndarray, path: Path) -> None:
    """Write an array as a file. A full disk is said with the bytes that it takes."""
    with naming(path, needed=lambda: array.nbytes), open(path, "wb") as file:
        file.write(array.tobytes())


def read_ids(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ids of a file, a million at a time."""
    with open(path, "rb") as file:
        while len(ids := np.fromfile(file, dtype, 10**6)):
            yield ids


def move_tail(source: Path, target: Path, start: int) -> None:
    """Move the bytes from start on into a new file."""
    size = source.stat().st_size - start
    with (
        naming(target, needed=lambda: size),
        open(source, "r+b") as file,
        open(target, "wb") as tail,
    ):
        file.seek(start)
        shutil.copyfileobj(file, tail)
        file.truncate(start)


def narrowest_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds ids 0 .. vocab_size - 1."""
    return np.min_scalar_type(max(0, vocab_size - 1)).newbyteorder("<")


# ------------------------------------------------------------------------------------------
# Opening


def open_dataset(name: str) -> Dataset:
    """Open data/<name>.

    Raises FileNotFoundError where there is none, ValueError where its files do not fit together.
    """
    folder = dataset_folder(name)
    if not (folder / SEAL).exists():
        there = f"; there are {', '.join(datasets())}" if datasets() else ""
        raise FileNotFoundError(
            f"no dataset in {folder}: make it with {prepare_command(name)}{there}"
        )
    meta = read_meta(folder)
    dtype = np.dtype(meta["dtype"])
    for split in SPLITS:
        path, size = folder / f"{split}.bin", numbers(meta[split]) * dtype.itemsize
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{path} should hold {size} bytes: {prepare_again(name)}")
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    train, val = (np.memmap(folder / f"{split}.bin", dtype, mode="r") for split in SPLITS)
    if "labels" in meta:
        sizes = [(meta[split]["examples"], meta[split]["labels"]) for split in SPLITS]
        train, val = Examples(train, *sizes[0]), Examples(val, *sizes[1])
    return Dataset(folder, train, val, tokenizer, meta)


def numbers(counts: dict) -> int:
    """How many numbers the file of a split holds."""
    if "examples" not in counts:
        return counts["tokens"]
    return file_length(counts["examples"], counts["labels"], counts["tokens"])


def read_meta(folder: Path) -> dict:
    """meta.json. Raises ValueError where it is not of this FORMAT."""
    path = folder / SEAL
    try:
        meta = json_of(path)
        if meta["format"] != FORMAT:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path} is damaged or of another version of nanolm: {prepare_again(folder.name)}"
        ) from None
    return {"task": TASK} | meta


def prepare_command(name: str) -> str:
    return f"python prepare.py {name}" + ("" if name in KNOWN_DATASETS else " --input PATH")


def prepare_again(name: str) -> str:
    """The way out of what is wrong with a dataset."""
    return f"prepare it again: {prepare_command(name)} --overwrite=true"


def check_dataset(name: str) -> dict:
    """Open data/<name> and compare its files with their fingerprints; returns meta.json."""
    dataset = open_dataset(name)
    wanted = {f"{split}.bin": dataset.meta[split]["sha256"] for split in SPLITS}
    for file, fingerprint in {**wanted, TOKENIZER_FILE: dataset.meta["tokenizer_sha256"]}.items():
        path = dataset.folder / file
        if sha256(path) != fingerprint:
            raise ValueError(
                f"{path} has changed since it was prepared (its sha256 differs from {SEAL}): "
                f"{prepare_again(name)}"
            )
    return dataset.meta
