"""Laws of byte pair encoding."""

import json
import random
import time
import timeit
from collections import Counter
from itertools import accumulate, pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.bpe import (
    GPT2_SPLIT,
    N_BYTES,
    compiled,
    encode_piece,
    learn_merges,
    learn_merges_naive,
    merge,
    merge_bytes,
    merge_steps,
    merges_of,
    neighbours,
    split,
    tokens_of,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))  # every str but lone surrogates
words = st.text("ab", max_size=20)  # two letters: runs, overlaps and ties everywhere
pairs = st.tuples(*[st.sampled_from("ab")] * 2)
corpora = st.lists(words | st.text("aé€😀", max_size=8) | texts, max_size=15)  # lists of pieces


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, r"\w+", r"[a-z]+| +(?=[a-z])", r"(?s:.+)"])
@given(text=texts)
def test_the_pieces_joined_are_the_text_whatever_the_pattern_misses(pattern, text):
    assert "".join(split(text, pattern)) == text


def runs_of(characters):
    return st.builds(str.__mul__, st.sampled_from(characters), st.integers(0, 9))


words_and_blanks = st.tuples(*[runs_of("a\x1c"), runs_of(" \n")] * 2, runs_of("a")).map("".join)


@settings(max_examples=500)
@given(words_and_blanks, st.integers(2, 6))
def test_long_white_space_is_cut_by_length_and_nothing_else_is(text, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanolm.bpe.LONGEST_BLANK", longest)
        pieces = split(text, r"(?s:.+)")
    long = [match.span() for match in regex.finditer(rf"\s{{{longest},}}", text)]
    cuts = {place for start, end in long for place in (*range(start, end, longest), end)}
    assert "".join(pieces) == text
    assert {*accumulate(map(len, pieces)), 0} == cuts | {0, len(text)}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(", "missing"), ("(a)", r"\(\?:"), ("(?P<n>a)", r"\(\?:")]
    # a match without a character, be it only before an x
    + [(pattern, "at least one character") for pattern in ["", "a|", r"\b", r"\s*", "$", "(?=x)"]]
    # what swallows the rule for any other character
    + [(pattern, "") for pattern in ["a\\", "a(?#", "(?x) a # b"]],
)
def test_a_pattern_that_cannot_cut_every_text_is_refused_by_name(pattern, reason):
    with pytest.raises(ValueError, match=f"pattern {regex.escape(repr(pattern))}.*{reason}"):
        compiled(pattern)


@given(words, pairs)
def test_merge_replaces_a_pair_from_left_to_right(word, pair):
    assert "".join(merge(word, pair, "Z")) == word.replace("".join(pair), "Z")


def test_all_neighbours_are_pairs_and_in_a_run_every_second_one_counts():
    assert list(neighbours("abcad")) == list(pairwise("abcad"))
    assert [len(list(neighbours("a" * n))) for n in range(6)] == [0, 0, 1, 1, 2, 2]


@given(words, pairs)
def test_neighbours_counts_the_pairs_that_merge_replaces(word, pair):
    """Pairs that overlap, as in aaa, count once: only one of them can be merged."""
    assert list(neighbours(word)).count(pair) == merge(word, pair, "Z").count("Z")


def test_the_example_at_the_top_of_the_chapter():
    text, (a, b, c, d) = "aaabdaaabac", b"abcd"
    Z, Y, X = range(N_BYTES, N_BYTES + 3)
    merges = learn_merges_naive([text], 3)
    assert merges == [(a, a), (a, b), (Z, Y)]
    assert encode_piece(text, ranks_of(merges)) == [X, d, X, a, c]


def test_the_steps_of_the_example_are_those_of_the_chapter():
    """Each merges a pair at all its places, and is a list of its own."""
    ranks = {b"aa": N_BYTES, b"ab": N_BYTES + 1, b"aaab": N_BYTES + 2}
    steps = [b" ".join(word) for word in list(merge_steps(b"aaabdaaabac", ranks))]
    assert steps[:2] == [b"a a a b d a a a b a c", b"aa a b d aa a b a c"]
    assert steps[2:] == [b"aa ab d aa ab a c", b"aaab d aaab a c"]


@pytest.mark.parametrize("learn", [learn_merges, learn_merges_naive])
def test_of_equally_frequent_pairs_the_smaller_ids_are_merged(learn):
    a, b, c, d = b"abcd"
    merges = list(learn(Counter(["cd", "ba", "ac", "ab"]), 4))
    assert merges == [(a, b), (a, c), (b, a), (c, d)]
    merges = list(learn(Counter(["abab", "cd", "cd"]), 3))
    assert merges == [(a, b), (c, d), (N_BYTES, N_BYTES)]


@given(corpora, st.integers(0, 60), st.randoms())
def test_fast_learning_is_textbook_learning_in_any_order_of_the_pieces(pieces, n_merges, random):
    merges = learn_merges_naive(pieces, n_merges)
    random.shuffle(pieces)
    assert list(learn_merges(Counter(pieces), n_merges)) == merges


def test_a_word_of_many_letters_is_not_walked_through_for_each_merge():
    """A file of DNA is one word. To look at all its letters for each merge took minutes."""
    word = "".join(random.Random(0).choices("acgt", k=300_000))
    walk = min(timeit.repeat(lambda: [a + b for a, b in pairwise(word)], number=1))
    began = time.process_time()
    assert len(list(learn_merges({word: 1}, 1000))) == 1000
    assert time.process_time() - began < 100 * walk


def test_tokens_are_the_bytes_and_then_what_each_merge_joins():
    a, b, c = b"abc"
    tokens = tokens_of([(a, b), (N_BYTES, c)])
    assert tokens[N_BYTES:] == [b"ab", b"abc"]
    assert tokens[:N_BYTES] == [bytes([i]) for i in range(N_BYTES)]


@given(corpora)
def test_learning_goes_on_until_each_piece_is_one_token_of_its_own_bytes(pieces):
    """And no two merges make the same bytes, or there would be no rank for each."""
    tokens = tokens_of(learn_merges(Counter(pieces), 10_000))
    assert {piece.encode() for piece in pieces if piece} <= set(tokens)
    assert len(set(tokens)) == len(tokens)


@given(corpora, st.integers(0, 32), words)
def test_merging_by_rank_is_making_the_merges_in_their_order(pieces, n_merges, unseen):
    merges = list(learn_merges(Counter(pieces), n_merges))
    for piece in [*pieces, unseen]:
        word = list(piece.encode())
        for i, pair in enumerate(merges):
            word = merge(word, pair, N_BYTES + i)
        assert encode_piece(piece, ranks_of(merges)) == word
        assert not set(pairwise(word)) & set(merges)


@given(corpora, st.integers(0, 60))
def test_the_bytes_of_the_tokens_tell_the_merges(pieces, n_merges):
    """merges_of is tokens_of backwards."""
    merges = list(learn_merges(Counter(pieces), n_merges))
    tokens = tokens_of(merges)
    assert merges_of(ranks_of(merges)) == [(tokens[a], tokens[b]) for a, b in merges]


@given(corpora, words, st.integers(0, 32))
def test_merging_below_a_rank_is_merging_by_the_tokens_before_it(pieces, unseen, n):
    ranks = ranks_of(list(learn_merges(Counter(pieces), 32)))
    earlier = {token: i for token, i in ranks.items() if i < N_BYTES + n}
    for piece in [*pieces, unseen]:
        merged = merge_bytes(piece.encode(), ranks, below=N_BYTES + n)
        assert merged == merge_bytes(piece.encode(), earlier)
        assert b"".join(merged) == piece.encode()


@pytest.mark.parametrize(
    ("tokens", "wrong"),
    [
        (["abc"], "abc"),  # three tokens are left of it
        (["ab", "cd", "abcde"], "abcde"),
        (["abc", "ab"], "abc"),  # too early
        (["bc", "ab", "abcd"], "abcd"),  # a, bc, d: merging bc leaves no ab
    ],
)
def test_a_table_that_no_merges_make_is_refused_with_the_token(tokens, wrong):
    ranks = ranks_of([]) | {token.encode(): N_BYTES + i for i, token in enumerate(tokens)}
    with pytest.raises(ValueError, match=f"token b'{wrong}' is not made by a merge"):
        merges_of(ranks)


def test_hugging_faces_trainer_makes_the_same_merges(test_data):
    """All of them, until every piece is one token: an implementation that shares no code.

    Its ties go to the smaller ids, too. Tiny Shakespeare is ASCII, so its characters are bytes,
    and with the first 256 of them as alphabet both give everything the same id. Theirs counts aaa
    as two pairs; here that changes nothing, for such runs are rare.
    """
    tokenizers = pytest.importorskip("tokenizers")
    text = (test_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(GPT2_SPLIT)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100_000, initial_alphabet=list(map(chr, range(N_BYTES))), show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    model = json.loads(theirs.to_str())["model"]
    merges = [tuple(model["vocab"][token] for token in pair) for pair in model["merges"]]
    assert list(learn_merges(Counter(split(text, GPT2_SPLIT)), 100_000)) == merges


def ranks_of(merges):
    return {token: i for i, token in enumerate(tokens_of(merges))}
