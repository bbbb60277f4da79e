"""Preparing what a name asks for: a dataset of one's own or a known one, and its tokenizer."""

import re
from functools import partial
from pathlib import Path

from nanolm.hub.names import is_hub_name
from nanolm.hub.tokenizers import find_tokenizer
from nanolm.text.bpe_tokenizer import END_OF_TEXT
from nanolm.text.conversations import check_alike, read_exchanges
from nanolm.text.corpus import Corpus, find_corpus, together
from nanolm.text.data import (
    KINDS,
    SEAL,
    TASK,
    Dataset,
    dataset_folder,
    open_dataset,
    read_meta,
    write_dataset,
)
from nanolm.text.documents import documents
from nanolm.text.examples import label_names, split_records
from nanolm.text.known import KNOWN_DATASETS
from nanolm.text.records import Record, read_records
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

DEFAULT_TOKENIZERS = {True: CharTokenizer.name, False: "bpe:2048"}  # of texts, of labelled ones
TOKENIZER_BYTES = 200_000_000  # of text, at most, to learn merges from


def find_dataset(name: str) -> Dataset:
    """Open data/<name>; a known dataset that is not there yet is prepared first."""
    if name in KNOWN_DATASETS and not (dataset_folder(name) / SEAL).exists():
        prepare(name)
    return open_dataset(name)


def prepare(
    name: str,
    *,
    task: str | None = None,
    inputs: tuple[str, ...] = (),
    val_inputs: tuple[str, ...] = (),
    text_key: str = "text",
    separator: str | None = END_OF_TEXT,
    label_key: str = "label",
    pair_keys: tuple[str, ...] = (),
    tokenizer: str | None = None,
    tokenizer_bytes: int = TOKENIZER_BYTES,
    val_fraction: float = 0.1,
    overwrite: bool = False,
) -> Path:
    """Make the dataset data/<name> from the inputs, or a known one from its own.

    inputs: see find_corpus; of a task with labels, read_records, and of one with answers,
    read_exchanges; val_inputs: those of the validation split, if it has its own. tokenizer: see
    make_tokenizer. Returns the folder; where it was made like this before, it is left as it is.
    Raises ValueError or FileNotFoundError, and leaves what was there, on bad input, and where
    another dataset has the name, unless overwrite.
    """
    folder, known = dataset_folder(name), KNOWN_DATASETS.get(name)
    task = task or (known.task if known else TASK)
    default = known.tokenizer if known else DEFAULT_TOKENIZERS[task == TASK]
    spec = default if tokenizer is None else tokenizer
    check_numbers(val_fraction, tokenizer_bytes)
    check_task(name, task)
    check_spec(spec)
    check_inputs(name, (*inputs, *val_inputs))
    if task == TASK:
        keys = {"text_key": text_key, "separator": separator}
        corpus = known.texts(folder) if known else find_corpus(inputs, **keys)
        val = find_corpus(val_inputs, **keys) if val_inputs else None
        keys["val_input"] = " ".join(val_inputs)
        write = partial(write_dataset, val_fraction=val_fraction, val=val)
    else:
        if task == "completion":
            read = partial(read_exchanges, keys=pair_keys)
        else:
            read = partial(read_records, words=task == "tagging", label_key=label_key)
        records = known.texts(folder, *map(Path, inputs)) if known else read(inputs)
        others = read(val_inputs) if val_inputs else None
        if task == "completion" and others:
            check_alike([records[0], others[0]])
        if task != "completion":
            label_names(records, others or ())  # what is wrong shows before the long work
        splits = (records, others) if others else split_records(records, val_fraction)
        between = "\n" if task == "completion" else " "
        corpus = corpus_of_records(splits[0], inputs or [name], between=between)
        keys = {"task": task, "val_input": " ".join(val_inputs), "label_key": label_key}
        keys["pair_keys"] = " ".join(pair_keys)
        write = partial(write_labelled, task, *splits)
    made_with = {
        "input": " ".join(inputs) or corpus.source,
        "bytes": corpus.size,
        **keys,
        "tokenizer": spec,
        "tokenizer_bytes": tokenizer_bytes,
        "val_fraction": val_fraction,
    }
    if not overwrite and (folder / SEAL).exists():
        check_same(folder, made_with)
        print(f"{folder} is there already, made from the same (--overwrite=true makes it anew)")
        return folder
    for line in (f"preparing {folder} from {corpus.source}", *corpus.notes):
        print(line, flush=True)
    known_text = together([corpus, val]) if task == TASK and val else corpus
    made = make_tokenizer(spec, known_text, tokenizer_bytes=tokenizer_bytes)
    write(folder, corpus, made, made_with=made_with)
    return folder


def write_labelled(
    task: str,
    train: list[Record],
    val: list[Record],
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    made_with: dict,
) -> None:
    """Encode records into a dataset folder, as their task does it."""
    from nanolm.tasks.table import TASKS  # brings torch, which takes seconds and memory

    TASKS[task].prepare(folder, train, val, tokenizer, source=corpus.source, made_with=made_with)


def corpus_of_records(records: list[Record], inputs: tuple[str, ...], *, between: str) -> Corpus:
    """The texts of records, to learn a tokenizer from. between: what stands between parts."""
    texts = [between.join(record.parts) for record in records]
    size = sum(len(text.encode()) for text in texts)
    return Corpus(", ".join(inputs), lambda: documents(texts), size)


def check_numbers(val_fraction: float, tokenizer_bytes: int) -> None:
    """Raise ValueError where one of them is out of range."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"val_fraction={val_fraction}: must be above 0 and below 1; or name a text for "
            "validation with --val_input=FILE"
        )
    if tokenizer_bytes < 1:
        raise ValueError(f"tokenizer_bytes={tokenizer_bytes}: must be at least 1")


def check_task(name: str, task: str) -> None:
    """Raise ValueError where a dataset cannot be for the task."""
    kinds = [KNOWN_DATASETS[name].task] if name in KNOWN_DATASETS else KINDS
    if task not in kinds:
        raise ValueError(f"task={task!r}: choose {' or '.join(kinds)}")


def check_inputs(name: str, inputs: tuple[str, ...]) -> None:
    """Raise ValueError where a known dataset is given other texts, or an unknown one none."""
    known = KNOWN_DATASETS.get(name)
    if known and inputs and not (known.takes_input and len(inputs) == 1):
        raise ValueError(
            f"{name!r} is a known dataset with a text of its own: give yours another name"
        )
    if name not in KNOWN_DATASETS and not inputs:
        raise ValueError(
            f"unknown dataset {name!r}: give its text with --input PATH, or choose one of "
            f"{', '.join(KNOWN_DATASETS)}"
        )


def check_same(folder: Path, made_with: dict) -> None:
    """Raise ValueError, naming what differs, where a dataset was made with something else."""
    there = read_meta(folder).get("made_with", {})
    differing = [
        f"{key} is {there.get(key, 'unknown')} there and {value} here"
        for key, value in made_with.items()
        if there.get(key, "unknown") != value
    ]
    if differing:
        raise ValueError(
            f"{folder} is another dataset ({'; '.join(differing)}): choose another name, or "
            "replace it with --overwrite=true"
        )


def check_spec(spec: str) -> None:
    """Raise ValueError where make_tokenizer knows no such tokenizer."""
    if spec in ("char", "gpt2", *KNOWN_DATASETS) or re.fullmatch(r"bpe:\d{1,9}", spec):
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
    of it. "gpt2": GPT-2's. The name of a known dataset: that dataset's. Otherwise the path of
    one, or of a dataset, a run or a pretrained model that has one, or OWNER/NAME of a model on the
    Hugging Face hub.
    """
    if spec == "gpt2":
        return BPETokenizer.gpt2()
    if spec in KNOWN_DATASETS:
        return find_dataset(spec).tokenizer
    if spec == "char":
        return CharTokenizer.train(corpus.texts("characters"))
    if spec.startswith("bpe:"):
        texts = corpus.texts("pieces", limit=tokenizer_bytes)
        return BPETokenizer.train(texts, int(spec.removeprefix("bpe:")))
    return find_tokenizer(spec)
