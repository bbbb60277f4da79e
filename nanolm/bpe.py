r"""Byte pair encoding: from bytes to tokens that stand for frequent pieces of text.

Start with one token for each of the 256 byte values, so that every text has ids. Then look for the
pair of neighbours that occurs most often in some training text (of equally frequent ones, the pair
with the smaller ids), make it a new token, put it wherever the pair stands, and begin again. The
merges, in the order in which they were learned, are all there is to know: a text is encoded by
making the same merges in the same order. (Gage 1994; for words, Sennrich et al. 2016,
arXiv:1508.07909; for bytes, GPT-2, Radford et al. 2019.)

    aaabdaaabac        aa occurs twice, as merges count it, and so does ab: Z = aa
    ZabdZabac          Za and ab occur twice: Y = ab
    ZYdZYac            ZY occurs twice: X = ZY
    XdXac              and so on, while any pair is left and more tokens are wanted

No merge crosses the border between two pieces, into which a pattern cuts the text first: words
with the space before them, numbers, punctuation, blanks. Otherwise "dog." and "dog!" would become
tokens of their own. (The patterns need classes like \p{L}, any letter, which the package regex
knows and Python's own re does not.)

Textbook loops come first. They are the meaning of what follows, and its test.
"""

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise

import regex

# GPT-2's pattern: 's, 't, 're ... | words | numbers | other signs | blanks, of which the last one
# is left to the word after it | blanks.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

ANY_CHARACTER = r"[\s\S]"  # to every engine: regex, tiktoken's, and Hugging Face's

LONGEST_BLANK = 10_000  # characters of white space in a row; tiktoken fails on a million

N_BYTES = 256  # the tokens to begin with: each byte is its own id

Pair = tuple[int, int]


# ------------------------------------------------------------------------------------------
# From text to pieces


def with_fallback(pattern: str) -> str:
    """The pattern, and any single character where it does not match: so none gets lost."""
    return f"(?:{pattern})|{ANY_CHARACTER}"


@lru_cache
def compiled(pattern: str) -> regex.Pattern:
    """with_fallback, ready for use. Raises ValueError for a pattern that cannot cut every text."""
    try:
        regex.compile(pattern)  # alone: )|( would fit into what is put around it
        found = regex.compile(with_fallback(pattern))
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None
    if found.groups:
        raise ValueError(f"pattern {pattern!r} has a capturing group: write (?:...) for (...)")
    if "" in found.findall("".join(map(chr, range(256)))):
        raise ValueError(
            f"pattern {pattern!r} can match the empty string: let every match have at least one "
            "character"
        )
    return found


def split(text: str, pattern: str) -> list[str]:
    """Cut a text into the pieces that are encoded one by one; joined, they are the text."""
    find = compiled(pattern).findall
    return [piece for part in cut_long_blanks(text) for piece in find(part)]


def cut_long_blanks(text: str) -> list[str]:
    """Cut white space of LONGEST_BLANK and more into stretches of that length.

    Nearly every text stays whole, and a look at every so many characters is enough to tell.
    """
    probe = LONGEST_BLANK // 2  # so long a stretch covers one of these, wherever it begins
    if not any(text[i : i + probe].isspace() for i in range(0, len(text), probe)):
        return [text]
    parts = []
    for i, part in enumerate(regex.split(rf"((?<!\s)\s{{{LONGEST_BLANK},}})", text)):
        step = LONGEST_BLANK if i % 2 else max(1, len(part))
        parts += [part[i : i + step] for i in range(0, len(part), step)]
    return parts


def count_pieces(texts: Iterable[str], *, pattern: str) -> Counter[str]:
    """How often each piece occurs in the texts."""
    counts = Counter()
    for text in texts:
        counts.update(split(text, pattern))
    return counts


# ------------------------------------------------------------------------------------------
# Learning merges, and making them: the textbook


def neighbours(word: Iterable[Hashable]) -> Iterator[tuple]:
    """The pairs of a word as a merge finds them: in aaaa, aa occurs twice, and not three times."""
    previous = None
    for pair in pairwise(word):
        if pair == previous:  # it begins with the token that ended the one before: aaa
            previous = None
        else:
            yield pair
            previous = pair


def merge(word: Iterable[Hashable], pair: tuple, token: Hashable) -> list:
    """Put the token in place of the pair, from left to right."""
    merged = []
    for other in word:
        if merged and (merged[-1], other) == pair:
            merged[-1] = token
        else:
            merged.append(other)
    return merged


def learn_merges_naive(pieces: Iterable[str], n_merges: int) -> list[Pair]:
    """The n_merges most useful merges, or fewer where no pair is left.

    Merge number i makes token 256 + i. Of pairs that are equally frequent the one with the smaller
    ids is merged: first the smaller first id, then the smaller second. So the order of the text
    does not matter.
    """
    words = [list(piece.encode()) for piece in pieces]
    merges = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in neighbours(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, best, N_BYTES + len(merges)) for word in words]
        merges.append(best)
    return merges


def tokens_of(merges: Iterable[Pair]) -> list[bytes]:
    """The bytes of each id: first every byte, then what each merge has joined."""
    tokens = [bytes([byte]) for byte in range(N_BYTES)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def encode_piece(piece: str, ranks: Mapping[bytes, int]) -> list[int]:
    """The ids of a piece: merge the pair of the lowest rank, until no two neighbours are a token.

    ranks: the id of every token by its bytes, earlier merges lower. (The bytes of a token tell its
    merge, for no two merges make the same bytes: wherever they have become two neighbours, with
    nothing merged over their ends, they have been through the same merges.)
    """
    return [ranks[token] for token in merge_bytes(piece.encode(), ranks)]


def merge_bytes(text: bytes, ranks: Mapping[bytes, int], *, below: float = math.inf) -> list:
    """The tokens that the merges of a rank below the given one make of some bytes."""
    return deque(merge_steps(text, ranks, below=below), maxlen=1).pop()  # keeps the last one


def merge_steps(
    text: bytes, ranks: Mapping[bytes, int], *, below: float = math.inf
) -> Iterator[list]:
    """The bytes as tokens of one byte each; then what each merge makes of them, to the last."""
    word = [text[i : i + 1] for i in range(len(text))]
    yield word
    while len(word) > 1:
        found = [ranks.get(left + right, math.inf) for left, right in pairwise(word)]
        lowest = min(found)
        if lowest >= below:
            break
        i = found.index(lowest)
        word = merge(word, (word[i], word[i + 1]), word[i] + word[i + 1])
        yield word


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each one of several bytes is merged from, by rank: tokens_of, backwards.

    They are what the bytes of the token are before its own merge. Raises ValueError for a token
    that the merges before it do not leave in two.
    """
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = merge_bytes(token, ranks, below=ranks[token])
        if len(parts) != 2:
            raise ValueError(f"token {token!r} is not made by a merge of two others")
        merges.append(tuple(parts))
    return merges


# ------------------------------------------------------------------------------------------
# Learning merges, fast


def learn_merges(counts: Mapping[str, int], n_merges: int) -> Iterator[Pair]:
    """Yields the merges of learn_merges_naive, from each different piece and how often it occurs.

    Three ideas make it fast. A text repeats its pieces, so each is merged once for all. A merge
    changes only the words that hold its pair, so these are known for each pair. And the count of a
    pair grows only when its later token is made, all at once; afterwards it can but fall, as other
    merges take its tokens away. So a queue holds for each pair a bound on its count. The pair with
    the highest bound is counted anew: if its count is still the bound, nothing can beat it;
    otherwise it queues again with its count.

    A word is a string with a character for each token, chr(id): replace and count find a pair from
    left to right without overlap, as merge and neighbours do. And find leaps from one new token to
    the next, for a word may have a million letters: DNA has no white space.
    """
    words = [piece.encode().decode("latin-1") for piece in counts]
    times = list(counts.values())
    places = defaultdict(list)  # pair -> the words in which it was seen, some more than once
    for i, word in enumerate(words):
        for left, right in pairwise(word):
            places[left + right].append(i)
    queue = [(-sum([times[i] for i in seen]), pair) for pair, seen in places.items()]
    heapq.heapify(queue)
    n = 0
    while queue and n < n_merges:
        bound, pair = heapq.heappop(queue)
        found = [i for i in dict.fromkeys(places.pop(pair)) if pair in words[i]]
        count = sum([times[i] * words[i].count(pair) for i in found])
        if count < -bound:
            if count:
                places[pair] = found
                heapq.heappush(queue, (-count, pair))
            continue
        yield ord(pair[0]), ord(pair[1])
        token, n = chr(N_BYTES + n), n + 1
        created = defaultdict(list)
        for i in found:
            word = words[i] = words[i].replace(pair, token)
            at = word.find(token)
            while at >= 0:
                if at > 0:
                    created[word[at - 1 : at + 1]].append(i)
                if at + 1 < len(word):
                    created[word[at : at + 2]].append(i)
                at = word.find(token, at + 1)
        for new, seen in created.items():
            heapq.heappush(queue, (-sum([times[i] for i in seen]), new))
        places.update(created)
