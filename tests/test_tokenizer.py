"""Laws of the tokenizer."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.tokenizer import CharTokenizer, load_tokenizer, stream_text

texts = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1
)  # every str but lone surrogates


@given(texts)
def test_decoding_inverts_encoding(text):
    tokenizer = CharTokenizer.train([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(ids) == len(text)


@given(st.lists(texts, min_size=1))
def test_the_alphabet_does_not_depend_on_the_order_of_the_texts(texts):
    tokenizer = CharTokenizer.train(texts)
    assert tokenizer == CharTokenizer.train(reversed(texts))
    assert tokenizer.characters == sorted(set("".join(texts)))


@given(texts)
def test_a_stream_decodes_to_the_same_text_as_the_whole(text):
    tokenizer = CharTokenizer.train([text])
    assert "".join(stream_text(tokenizer, tokenizer.encode(text))) == text


def test_a_character_spanning_tokens_is_streamed_when_it_is_complete():
    """A byte tokenizer stands in for any whose tokens can split a character."""

    class Bytes:
        def decode_bytes(self, ids):
            return bytes(ids)

    pieces = list(stream_text(Bytes(), "aé€😀".encode()))
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀"]
    assert "".join(stream_text(Bytes(), "é".encode()[:1])) == "\ufffd"


@settings(max_examples=20)
@given(text=texts)
def test_a_saved_tokenizer_is_loaded_equal(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    tokenizer = CharTokenizer.train([text])
    tokenizer.save(path)
    assert load_tokenizer(path) == tokenizer
    assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_tokenizers_of_other_alphabets_differ():
    assert CharTokenizer("ab") != CharTokenizer("abc")


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\), at position 2, .* only 'abc'"):
        CharTokenizer("abc").encode("abé")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", json.dumps({"format": 1, "kind": "char", "characters": 3})]
    + [json.dumps({"format": 2, "kind": "char", "characters": "ab"})]
    + [json.dumps({"format": 1, "kind": "other", "characters": "ab"})],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t\.json is missing, or no tokenizer"):
        load_tokenizer(tmp_path / "t.json")
