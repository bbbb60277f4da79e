"""Text to token ids, and back.

A model reads and writes small integers. The simplest tokenizer gives every character of the
training text an id of its own: nothing to learn, a vocabulary of a hundred or so, and sequences as
long as the text. Characters outside its alphabet have no id.

Every tokenizer here has vocab_size, encode, decode, decode_bytes and save, and load_tokenizer
reads back what save has written.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanolm.files import write_text

FORMAT = 1  # of the JSON file


class CharTokenizer:
    """One id per character, in the order of their code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]):
        """characters: the alphabet; order and repetition do not matter."""
        self.characters = sorted(set(characters))
        self.ids = {character: i for i, character in enumerate(self.characters)}

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of all characters that occur in the texts."""
        return cls(set().union(*texts))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, one per character. Raises ValueError at a character without one."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}), at "
                f"position {text.index(character)}, is not in the tokenizer's alphabet: use "
                f"only {''.join(self.characters)!r}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids."""
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of the ids in UTF-8; for characters, always whole ones."""
        return self.decode(ids).encode("utf-8")

    def save(self, path: str | Path) -> None:
        """Write one JSON file that load_tokenizer reads."""
        content = {"format": FORMAT, "kind": self.kind, "characters": "".join(self.characters)}
        write_text(path, json.dumps(content) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters


def load_tokenizer(path: str | Path) -> CharTokenizer:
    """Read a tokenizer that save has written. Raises ValueError where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if (content["format"], content["kind"]) != (FORMAT, CharTokenizer.kind):
            raise ValueError
        return CharTokenizer(content["characters"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path} is missing, or no tokenizer of this version of nanolm: prepare the text again"
        ) from None


def stream_text(tokenizer: CharTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids that arrive one by one, as soon as each character is complete.

    Joined, the pieces are the decoded text; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)
