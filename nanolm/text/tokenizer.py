"""Text to token ids, and back: what tokenizers have in common.

A model reads and writes small integers. Every tokenizer here has a name, vocab_size,
special_tokens, begin_of_text, end_of_text, encode, decode, decode_bytes and save, and
load_tokenizer reads back what save has written.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanolm.system.files import json_of
from nanolm.text import gpt2
from nanolm.text.bpe_tokenizer import BPETokenizer
from nanolm.text.char_tokenizer import FORMAT, CharTokenizer
from nanolm.text.pretrained import PretrainedTokenizer

TOKENIZER_FILE = "nanolm_tokenizer.json"  # its name in the folder of a dataset or of a run

Tokenizer = CharTokenizer | BPETokenizer | PretrainedTokenizer
KINDS = {kind.kind: kind for kind in (CharTokenizer, BPETokenizer, PretrainedTokenizer)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that save has written, from its file or from the folder that holds it.

    GPT-2's own encoder.json or its folder is welcome, too. Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_dir():
        names = (TOKENIZER_FILE, gpt2.FILE)
        path = path / next((name for name in names if (path / name).exists()), TOKENIZER_FILE)
    if path.name == gpt2.FILE:
        return BPETokenizer.gpt2(path.parent)
    try:
        content = json_of(path)
        if content["format"] != FORMAT:
            raise ValueError
        return KINDS[content["kind"]].from_json(content)
    except OSError as error:
        if path.exists():
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        what = "is missing"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = "is no tokenizer of this version of nanolm"
        if path.name != TOKENIZER_FILE:
            raise ValueError(
                f"{path} {what}: name the folder of a dataset, a run or a pretrained model that "
                "has one, or another file"
            ) from None
    raise ValueError(f"{path} {what}: prepare the text again, or name another")


MASKS = ("<|mask|>", "[MASK]", "<mask>")  # ours, and those of others


def mask_of(tokenizer: Tokenizer) -> int | None:
    """The id of the token that stands for a hidden one, if there is one."""
    special = tokenizer.special_tokens
    return next((special[name] for name in MASKS if name in special), None)


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, or with one token more, for the mask."""
    return tokenizer if mask_of(tokenizer) is not None else tokenizer.with_special(MASKS[0])


def extends(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether one is the other, or has more special tokens behind those of the other."""
    if type(one) is not type(other):
        return False
    special = one.special_tokens
    for token in sorted(special.keys() - other.special_tokens.keys(), key=special.get):
        other = other.with_special(token)
    return one == other


def framed(tokenizer: Tokenizer, *parts: list[int]) -> list[int]:
    """Ids of a text or of a pair, with what begins it and what ends each part."""
    begin, end = existing(tokenizer.begin_of_text), existing(tokenizer.end_of_text)
    return begin + [i for part in parts for i in (*part, *end)]


def existing(*tokens: int | None) -> list[int]:
    """Those of the tokens that a tokenizer has."""
    return [token for token in tokens if token is not None]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids that arrive one by one, as soon as each character is complete.

    Joined, the pieces are the decoded text; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)
