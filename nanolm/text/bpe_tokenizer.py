"""Byte pair encoding as a tokenizer: learned, saved, and fast. bpe.py is the algorithm.

It has tokens for frequent words and for every byte, so its sequences are several times shorter
than those of characters, and no text is foreign to it. A special token says something about the
text and is no part of it: in a text to encode, its name is ordinary characters, unless the caller
allows it to be more.
"""

import json
import sys
import unicodedata
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from textwrap import shorten

import regex
import tiktoken

from nanolm.bpe import (
    GPT2_SPLIT,
    N_BYTES,
    compiled,
    count_pieces,
    cut_long_blanks,
    encode_piece,
    learn_merges,
    split,
    tokens_of,
    with_fallback,
)
from nanolm.system.files import write_text
from nanolm.system.workers import progress
from nanolm.text import gpt2
from nanolm.text.char_tokenizer import FORMAT, check_characters, look_up

END_OF_TEXT = "<|endoftext|>"
UTF_32 = f"utf-32-{sys.byteorder[0]}e"


class BPETokenizer:
    """Byte-level byte pair encoding, with special tokens."""

    kind = "bpe"
    begin_of_text = None

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int] = {},
        *,
        pattern: str = GPT2_SPLIT,
        name: str | None = None,
        end_token: str = END_OF_TEXT,
        normal_form: str | None = None,
    ):
        """ranks: bytes -> id of every token, earlier merges lower; special_tokens: text -> id.

        name: what prepare.py calls it. end_token: the special token that ends a document, if it
        is one of them. normal_form: the Unicode form, as "NFC", that texts are brought to first.
        Raises ValueError for ids that are not 0, 1, 2 ... without gap, for a byte without token,
        and for a pattern that cannot cut a text.
        """
        self.ranks, self.special_tokens = dict(ranks), dict(special_tokens)
        self.pattern, self.name = pattern, name or f"bpe:{self.vocab_size}"
        self.end_token, self.normal_form = end_token, normal_form
        ids = [*self.ranks.values(), *self.special_tokens.values()]
        if sorted(ids) != list(range(len(ids))) or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"{len(ids)} tokens need the ids 0 to {len(ids) - 1}, each once")
        if not all(bytes([byte]) in self.ranks for byte in range(N_BYTES)):
            raise ValueError("each of the 256 bytes needs a token, or some texts have none")
        if "" in self.special_tokens:
            raise ValueError("a special token needs a name of at least one character")
        check_characters("".join(self.special_tokens))
        compiled(pattern)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = GPT2_SPLIT,
        special_tokens: Collection[str] = (END_OF_TEXT,),
    ) -> "BPETokenizer":
        """Learn a vocabulary from texts: the bytes, then merges, then the special tokens.

        vocab_size counts them all. Texts in which no pair is left to merge give a smaller
        vocabulary, and a warning on stderr. Raises ValueError where the size is too small for the
        bytes and the special tokens, or too large for a merge to have a character (see bpe.py).
        """
        special_tokens = list(dict.fromkeys(special_tokens))
        n_fixed = N_BYTES + len(special_tokens)
        if not isinstance(vocab_size, int) or not n_fixed <= vocab_size <= sys.maxunicode:
            raise ValueError(
                f"vocab_size={vocab_size}: choose at least {n_fixed} ({N_BYTES} for the bytes and "
                f"{len(special_tokens)} for special tokens) and at most {sys.maxunicode}"
            )
        if isinstance(texts, str):
            raise ValueError("texts is one string: give a list, [text]")
        compiled(pattern)
        counts = count_pieces(texts, pattern=pattern)
        n_merges = vocab_size - n_fixed
        learning = learn_merges(counts, n_merges)
        merges = list(progress(iterable=learning, total=n_merges, desc="merges"))
        tokens = tokens_of(merges)
        if len(tokens) + len(special_tokens) < vocab_size:
            print(
                f"warning: the text has no more pairs to merge: "
                f"{len(tokens) + len(special_tokens)} tokens instead of {vocab_size}",
                file=sys.stderr,
            )
        ranks = {token: i for i, token in enumerate(tokens)}
        special = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        return cls(ranks, special, pattern=pattern)

    @classmethod
    def gpt2(cls, folder: str | Path | None = None) -> "BPETokenizer":
        """GPT-2's vocabulary: from a folder that holds its encoder.json, or through tiktoken.

        tiktoken downloads it once, and checks it. Raises ValueError where that fails, or where the
        file is missing or not GPT-2's.
        """
        try:
            ranks = gpt2.read(Path(folder) / gpt2.FILE) if folder else gpt2.download()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot get GPT-2's vocabulary ({shorten(str(error), 120)}); try again, or name "
                f"a folder that holds its {gpt2.FILE}: python prepare.py NAME --tokenizer=FOLDER"
            ) from None
        return cls(ranks, {END_OF_TEXT: len(ranks)}, name="gpt2")

    def with_special(self, token: str) -> "BPETokenizer":
        """The same tokenizer with one special token more, which gets the next id."""
        special = self.special_tokens | {token: self.vocab_size}
        options = {"pattern": self.pattern, "end_token": self.end_token}
        return BPETokenizer(self.ranks, special, normal_form=self.normal_form, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.special_tokens)

    @property
    def end_of_text(self) -> int | None:
        """The id of the special token that ends a document, if there is one."""
        return self.special_tokens.get(self.end_token)

    def normalize(self, text: str) -> str:
        """The text that its ids give back."""
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the text: what encode_naive gives, by tiktoken.

        Which characters are letters, as \\p{L} in the pattern, the package regex decides for both,
        and for learning: it knows a newer Unicode than tiktoken, which is given its classes.

        allowed_special: the special tokens that mean themselves where they stand in the text, or
        "all"; any other is ordinary characters. Raises ValueError for one that does not exist, and
        for half a surrogate pair, which is no character.
        """
        return self._encode(text, allowed_special, self._engine.encode_ordinary)

    def encode_naive(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """The same by the textbook: cut into pieces, and merge in each the lowest rank first."""

        def encode_ordinary(stretch: str) -> list[int]:
            pieces = split(stretch, self.pattern)
            return [i for piece in pieces for i in encode_piece(piece, self.ranks)]

        return self._encode(text, allowed_special, encode_ordinary)

    def _encode(
        self,
        text: str,
        allowed_special: Collection[str],
        encode_ordinary: Callable[[str], list[int]],
    ) -> list[int]:
        """The ids of the special tokens that are allowed, and of what stands between them."""
        check_characters(text)
        allowed = list(self.special_tokens if allowed_special == "all" else allowed_special)
        for token in allowed:
            if token not in self.special_tokens:
                raise ValueError(
                    f"special token {token!r}: this tokenizer has {list(self.special_tokens)}"
                )
        ids = []
        for i, part in enumerate(cut_out(allowed, text)):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                for stretch in cut_long_blanks(self.normalize(part)):
                    ids += encode_ordinary(stretch)
        return ids

    @cached_property
    def _engine(self) -> tiktoken.Encoding:
        pattern = regex.sub(
            r"\\[pP]\{[^}]*\}", lambda c: spelled_out(c[0]), with_fallback(self.pattern)
        )
        return tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        special = {i: text.encode() for text, i in self.special_tokens.items()}
        return {i: token for token, i in self.ranks.items()} | special

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, maybe parts of characters. Raises ValueError for an unknown id."""
        return b"".join(look_up(self._bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write one JSON file that load_tokenizer reads; a byte is the character of its number."""
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "pattern": self.pattern,
            "end_token": self.end_token,
            "normal_form": self.normal_form,
            "special_tokens": self.special_tokens,
            "ranks": {token.decode("latin-1"): i for token, i in self.ranks.items()},
        }
        write_text(path, json.dumps(content, indent=0) + "\n")

    @classmethod
    def from_json(cls, content: dict) -> "BPETokenizer":
        """The tokenizer of what save has written."""
        ranks = {token.encode("latin-1"): i for token, i in content["ranks"].items()}
        younger = {key: content[key] for key in ("end_token", "normal_form") if key in content}
        options = {"pattern": content["pattern"], "name": content["name"]} | younger
        return cls(ranks, content["special_tokens"], **options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BPETokenizer):
            return False
        keys = ("ranks", "special_tokens", "pattern", "end_of_text", "normal_form")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@lru_cache
def spelled_out(kind: str) -> str:
    """A class of characters, as \\p{L}, by its ranges: other engines know other versions of it."""
    found = regex.finditer(rf"\p{kind[2:]}+", every_character())
    ranges = (f"\\x{{{ord(run[0][0]):x}}}-\\x{{{ord(run[0][-1]):x}}}" for run in found)
    return "[" + "^" * kind.startswith("\\P") + "".join(ranges) + "]"


@lru_cache
def every_character() -> str:
    """All of Unicode, in order."""
    return array("I", range(sys.maxunicode + 1)).tobytes().decode(UTF_32, "surrogatepass")


def cut_out(names: Collection[str], text: str) -> list[str]:
    """The text between the names at even places, and the names at odd ones."""
    if not names:
        return [text]
    longest_first = sorted(names, key=len, reverse=True)  # one may begin with another
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)
