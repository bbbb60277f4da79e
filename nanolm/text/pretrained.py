"""Tokenizers of pretrained models, as Hugging Face's package tokenizers runs them.

A tokenizer.json describes a pipeline: text is normalized, split into words, and each word into
tokens by a model (BPE, WordPiece, Unigram ...). The package interprets all of them, in Rust. Here
such a pipeline gets the interface of the other tokenizers, and their form on disk.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from nanolm.system.files import write_text
from nanolm.text.char_tokenizer import FORMAT, look_up
from nanolm.text.gpt2 import byte_of_character

BYTES = byte_of_character()
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A pipeline of the package tokenizers.

    pipeline: the text of its tokenizer.json, as the package writes it. end_token: the token that
    ends a document.
    """

    pipeline: str
    end_token: str | None = None

    kind = "pretrained"

    def with_special(self, token: str) -> "PretrainedTokenizer":
        """The same tokenizer with one special token more, which gets the next id."""
        pipeline = package().Tokenizer.from_str(self.pipeline)
        pipeline.add_special_tokens([token])
        return PretrainedTokenizer(pipeline.to_str(), self.end_token)

    @property
    def name(self) -> str:
        """What is said of it where datasets and models do not fit together."""
        return f"{self.kind}:{self.vocab_size}"

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; some tokenizers leave ids out."""
        return max(open_pipeline(self.pipeline).get_vocab().values()) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that say something about a text and are no part of it."""
        added = open_pipeline(self.pipeline).get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @cached_property
    def begin_of_text(self) -> int | None:
        """The id of the special token that the pipeline puts before every text, if it does so."""
        found = open_pipeline(self.pipeline).encode("a")
        return found.ids[0] if found.special_tokens_mask[:1] == [1] else None

    @property
    def end_of_text(self) -> int | None:
        """The id of the token that ends a document, if there is one."""
        return self.end_token and open_pipeline(self.pipeline).token_to_id(self.end_token)

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the text, without what the pipeline puts before and behind every text.

        allowed_special: "all" where special tokens in the text mean themselves; otherwise they are
        ordinary characters. Raises ValueError for a choice of them.
        """
        if allowed_special not in ((), "all"):
            raise ValueError(f"allowed_special={allowed_special!r}: choose () or 'all' here")
        pipeline = open_pipeline(self.pipeline, special=allowed_special == "all")
        return pipeline.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return open_pipeline(self.pipeline).decode(list(ids), skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the ids add to the text before them. Raises ValueError for an unknown id.

        A token that begins a word adds a blank to it, also where decode leaves one out because a
        text begins there.
        """
        return b"".join(look_up(self._bytes, ids))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        pipeline = open_pipeline(self.pipeline)
        found = dict.fromkeys(range(self.vocab_size), b"")
        for token, i in pipeline.get_vocab().items():
            found[i] = spelled_bytes(token, pipeline) or added_text(i, pipeline).encode()
        return found

    def save(self, path: str | Path) -> None:
        """Write one JSON file that load_tokenizer reads."""
        content = {"format": FORMAT, "kind": self.kind, "end_token": self.end_token}
        content["pipeline"] = self.pipeline
        write_text(path, json.dumps(content, indent=0) + "\n")

    @classmethod
    def from_json(cls, content: dict) -> "PretrainedTokenizer":
        """The tokenizer of what save has written."""
        return cls(content["pipeline"], content["end_token"])


def package() -> ModuleType:
    """The package tokenizers. Raises ValueError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("this tokenizer needs a package: pip install tokenizers") from None
    return tokenizers


@lru_cache
def open_pipeline(text: str, *, special: bool = True) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json; special: whether it finds special tokens.

    It neither cuts texts off nor pads them.
    """
    pipeline = package().Tokenizer.from_str(text)
    pipeline.no_truncation()
    pipeline.no_padding()
    pipeline.encode_special_tokens = not special
    return pipeline


def spelled_bytes(token: str, pipeline: Any) -> bytes | None:
    """The bytes that a token spells, where its pipeline has tokens for bytes."""
    byte_level = isinstance(pipeline.decoder, package().decoders.ByteLevel)
    if byte_level and BYTES.keys() >= set(token):
        return bytes(BYTES[character] for character in token)
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else None


def added_text(i: int, pipeline: Any) -> str:
    """What a token adds to a text: the first of two could be at its start, and lose a blank."""
    once, twice = (pipeline.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
    return twice.removeprefix(once)
