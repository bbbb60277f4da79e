"""The simplest tokenizer: an id for each character of the training text.

Nothing to learn, a vocabulary of a hundred or so, and sequences as long as the text. Characters
outside its alphabet have no id.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nanolm.system.files import write_text

FORMAT = 1  # of the JSON file
SHOWN = 40  # characters of an alphabet, at most, where one is missing


class CharTokenizer:
    """One id per character, in the order of their code points."""

    kind = name = "char"
    special_tokens: Mapping[str, int] = {}
    begin_of_text = end_of_text = None

    def __init__(self, characters: Iterable[str]):
        """characters: the alphabet; order and repetition do not matter."""
        self.characters = sorted(set(characters))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.texts = dict(enumerate(self.characters))

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of all characters that occur in the texts."""
        characters = set()
        for text in texts:
            characters.update(text)
        return cls(characters)

    def with_special(self, token: str) -> "CharTokenizer":
        """Raises ValueError: there are characters alone."""
        raise ValueError(
            f"characters have no token for {token}: prepare the text with --tokenizer=bpe:1024"
        )

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the text, one per character. Raises ValueError at a character without one.

        allowed_special has no meaning here: both tokenizers are called alike.
        """
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            more = f" and {self.vocab_size - SHOWN:,} more" * (self.vocab_size > SHOWN)
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}), at "
                f"position {text.index(character)}, is not in the tokenizer's alphabet: use "
                f"only {''.join(self.characters[:SHOWN])!r}{more}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Raises ValueError for an unknown id."""
        return "".join(look_up(self.texts, ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of the ids in UTF-8; for characters, always whole ones."""
        return self.decode(ids).encode("utf-8")

    def save(self, path: str | Path) -> None:
        """Write one JSON file that load_tokenizer reads."""
        content = {"format": FORMAT, "kind": self.kind, "characters": "".join(self.characters)}
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def from_json(cls, content: dict) -> "CharTokenizer":
        """The tokenizer of what save has written."""
        return cls(content["characters"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters


def look_up(table: Mapping[int, Any], ids: Iterable[int]) -> list:
    """What the table has for each id. Raises ValueError where it has nothing."""
    try:
        return [table[i] for i in ids]
    except KeyError as error:
        raise ValueError(
            f"id {error.args[0]} is outside the vocabulary of {len(table)} tokens"
        ) from None


def check_characters(text: str) -> None:
    """Raise ValueError where a text has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text[error.start : error.end]!r} at position {error.start}: halves of surrogate "
            "pairs belong to UTF-16 and are no characters; leave them out, or join them by "
            ".encode('utf-16', 'surrogatepass').decode('utf-16')"
        ) from None
