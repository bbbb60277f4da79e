"""WordPiece: a word becomes the longest pieces that the vocabulary has, from left to right.

BERT's tokenizer (Devlin et al. 2019; Schuster & Nakajima 2012). Where byte pair encoding keeps the
merges that it has learned, and replays them, this keeps the pieces alone, and matches them:

    vocabulary  un  ##aff  ##able  ##a
    unaffable   un, then of "affable" the longest piece: ##aff, then ##able

Pieces inside a word are marked by ##, so that a text can be put together again. A word that cannot
be matched to its end becomes one unknown token: unlike bytes, pieces do not cover every text. What
is left out is how the pieces are learned: as in byte pair encoding, but for the choice of pairs.
"""

from collections.abc import Collection, Iterator

import regex

INSIDE, UNKNOWN = "##", "[UNK]"
LONGEST_WORD = 100  # characters; a longer one is unknown, so that matching stays fast
PUNCTUATION = r"\p{P}$+<=>^`|~"
WORD = regex.compile(rf"[{PUNCTUATION}]|[^\s{PUNCTUATION}]+")


def encode(text: str, vocabulary: Collection[str]) -> list[str]:
    """The pieces of a text; each sign of punctuation is a word of its own."""
    return [piece for word in WORD.findall(text) for piece in pieces(word, vocabulary)]


def pieces(word: str, vocabulary: Collection[str]) -> list[str]:
    """The pieces of a word, longest match first."""
    found, start = [], 0
    while start < len(word) <= LONGEST_WORD:
        piece = next((p for p in candidates(word, start) if p in vocabulary), None)
        if piece is None:
            return [UNKNOWN]
        found.append(piece)
        start += len(piece) - (len(INSIDE) if start else 0)
    return found or [UNKNOWN]


def candidates(word: str, start: int) -> Iterator[str]:
    """What a piece from start on could be, the longest first."""
    for end in range(len(word), start, -1):
        yield (INSIDE if start else "") + word[start:end]
