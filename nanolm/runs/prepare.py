"""Preparing what a name asks for: a dataset of one's own or a known one, and its tokenizer."""

import re
from pathlib import Path

from nanolm.hub.names import is_hub_name
from nanolm.hub.tokenizers import find_tokenizer
from nanolm.text.corpus import Corpus, find_corpus
from nanolm.text.data import SEAL, Dataset, dataset_folder, open_dataset, write_dataset
from nanolm.text.known import KNOWN_DATASETS
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

TOKENIZER_BYTES = 200_000_000  # of text, at most, to learn merges from


def find_dataset(name: str) -> Dataset:
    """Open data/<name>; a known dataset that is not there yet is prepared first."""
    if name in KNOWN_DATASETS and not (dataset_folder(name) / SEAL).exists():
        prepare(name)
    return open_dataset(name)


def prepare(
    name: str,
    *,
    inputs: tuple[str, ...] = (),
    tokenizer: str | None = None,
    tokenizer_bytes: int = TOKENIZER_BYTES,
    val_fraction: float = 0.1,
) -> Path:
    """Make the dataset data/<name> from the inputs (see find_corpus), or a known one from its own.

    tokenizer: see make_tokenizer. Returns the folder. Raises ValueError or FileNotFoundError, and
    leaves what was there, on bad input.
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
    if tokenizer_bytes < 1:
        raise ValueError(f"tokenizer_bytes={tokenizer_bytes}: must be at least 1")
    default = known.tokenizer if known else CharTokenizer.name
    spec = default if tokenizer is None else tokenizer
    check_spec(spec)
    if (
        known
        and spec != known.tokenizer
        and not (known.tokenizer == "gpt2" and Path(spec).exists())
    ):
        raise ValueError(
            f"tokenizer={spec!r}: {name} goes with {known.tokenizer}; leave the key out"
        )
    corpus = known.corpus(folder) if known else find_corpus(inputs)
    made = make_tokenizer(spec, corpus, tokenizer_bytes=tokenizer_bytes)
    if known and made.name != known.tokenizer:
        raise ValueError(f"{name} goes with {known.tokenizer}, and this would be {made.name}")
    write_dataset(folder, corpus, made, val_fraction=val_fraction)
    return folder


def check_spec(spec: str) -> None:
    """Raise ValueError where make_tokenizer knows no such tokenizer."""
    if spec in ("char", "gpt2") or re.fullmatch(r"bpe:\d{1,9}", spec):
        return
    if spec and (Path(spec).is_file() or Path(spec).is_dir() or is_hub_name(spec)):
        return
    raise ValueError(
        f"tokenizer={spec!r}: choose char, bpe:N (with N tokens, say bpe:4096), gpt2, the path "
        "of a tokenizer that exists, or OWNER/NAME of a model on the Hugging Face hub"
    )


def make_tokenizer(
    spec: str, corpus: Corpus, *, tokenizer_bytes: int = TOKENIZER_BYTES
) -> Tokenizer:
    """The tokenizer that spec asks for.

    "char": the characters of the corpus. "bpe:N": N tokens, learned from the first tokenizer_bytes
    of it. "gpt2": GPT-2's. Otherwise the path of one, or of a dataset, a run or a
    pretrained model that has one, or OWNER/NAME of a model on the Hugging Face hub.
    """
    if spec == "gpt2":
        return BPETokenizer.gpt2()
    if spec == "char":
        return CharTokenizer.train(corpus.texts("characters"))
    if spec.startswith("bpe:"):
        texts = corpus.texts("pieces", limit=tokenizer_bytes)
        return BPETokenizer.train(texts, int(spec.removeprefix("bpe:")))
    return find_tokenizer(spec)
