"""Laws of WordPiece."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm.wordpiece import LONGEST_WORD, UNKNOWN, encode, pieces

KNOWN = ["un", "##aff", "##able", "##a", "a", "ab", "b", "##b", "##ab", ".", "é"]
VOCABULARY = {piece: i for i, piece in enumerate([UNKNOWN, *KNOWN])}


def theirs(text: str, vocabulary: dict[str, int]) -> list[str]:
    """The pieces by Hugging Face's package tokenizers."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordPiece(
        vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD
    )
    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return pipeline.encode(text).tokens


words = st.text(st.sampled_from("abcé.,$ \n"), max_size=20)


@st.composite
def vocabularies(draw) -> dict[str, int]:
    """Some pieces that begin a word, and some that are inside one."""
    parts = st.lists(st.text("abcé", min_size=1, max_size=3), max_size=6)
    found = [UNKNOWN, *draw(parts), *(f"##{part}" for part in draw(parts))]
    return {piece: i for i, piece in enumerate(dict.fromkeys(found))}


@given(words, vocabularies())
def test_a_text_has_the_pieces_that_it_has_in_the_package(text, vocabulary):
    assert encode(text, vocabulary) == theirs(text, vocabulary)


# The package's table of punctuation ends with Unicode 8 (2015); this standard is from 2004.
in_many_scripts = st.characters(codec="euc_jis_2004", categories=("L", "M", "N", "P", "S", "Zs"))


@given(st.text(in_many_scripts))
def test_so_has_a_text_in_many_scripts(text):
    assert encode(text, VOCABULARY) == theirs(text, VOCABULARY)


@given(st.text("ab", min_size=1, max_size=12))
def test_pieces_that_are_known_make_up_the_word(word):
    assert "".join(piece.removeprefix("##") for piece in pieces(word, VOCABULARY)) == word


def test_the_longest_piece_comes_first_and_a_word_is_known_as_a_whole_or_not_at_all():
    assert pieces("unaffable", VOCABULARY) == ["un", "##aff", "##able"]
    assert encode("unaffablx ab.", VOCABULARY) == [UNKNOWN, "ab", "."]


@pytest.mark.parametrize("n", [LONGEST_WORD, LONGEST_WORD + 1])
def test_a_word_that_is_too_long_is_unknown(n):
    assert encode("a" * n, VOCABULARY) == theirs("a" * n, VOCABULARY)
