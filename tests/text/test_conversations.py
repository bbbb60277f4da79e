"""Laws of texts that answer texts: in files, and as tokens."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import CORPUS, GPT4_SPLIT

from nanolm.hub.tokenizers import pipeline_of, write_tokenizer
from nanolm.layers import ModelConfig
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.char_tokenizer import CharTokenizer
from nanolm.text.conversations import (
    CHAT_TOKENS,
    ENDS,
    PAIR,
    ROLES,
    answer_opening,
    can_chat,
    chatml,
    exchange_ids,
    prompt_ids,
    read_exchanges,
    with_answers,
)
from nanolm.text.pretrained import PretrainedTokenizer
from nanolm.text.records import Record


def read(path: Path, content: object, **options) -> list[Record]:
    """The records of a file with that content: text as it is, and anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode())
    return read_exchanges([str(path)], **options)


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


# ------------------------------------------------------------------------------------------
# In files

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "c",
                    "qas": [
                        {"id": "1", "question": "p", "answers": [{"text": "a"}, {"text": "b"}]},
                        {"id": "2", "question": "q", "answers": []},
                    ],
                }
            ]
        }
    ]
}


@pytest.mark.parametrize(
    ("name", "content", "pairs"),
    [
        ("a.jsonl", {"prompt": "p", "completion": "a"}, [("p", "a")]),
        ("a.jsonl", {"text": "p", "summary": "a"}, [("p", "a")]),
        ("a.jsonl", {"document": "p", "summary": "a", "id": 7}, [("p", "a")]),
        ("a.jsonl", {"source": "p", "target": " a "}, [("p", " a ")]),
        ("a.jsonl", {"translation": {"en": "p", "fr": "a"}}, [("p", "a")]),
        ("a.jsonl", {"instruction": "p", "output": "a"}, [("p", "a")]),
        ("a.jsonl", {"instruction": "p", "input": "", "output": "a"}, [("p", "a")]),
        ("a.jsonl", {"instruction": "p", "input": "i", "output": "a"}, [("p\ni", "a")]),
        ("a.jsonl", {"question": "p", "answer": "a"}, [("p", "a")]),
        ("a.jsonl", {"question": "p", "answer": "a", "context": "c"}, [("c\np", "a")]),
        ("a.jsonl", {"question": "p", "answer": "a", "context": None}, [("p", "a")]),
        ("a.jsonl", {"context": "c", "question": "p", "answers": {"text": ["a", "b"]}}, "cp"),
        ("a.jsonl", {"context": "c", "question": "p", "answers": {"text": "a"}}, "cp"),
        ("a.jsonl", {"context": "c", "question": "p", "answers": {"text": []}}, [("c\np", "")]),
        ("a.jsonl", '\n{"prompt": "p", "completion": "a"}\r\n\r\n', [("p", "a")]),
        ("a.tsv", "p\ta\nq\tb\n", [("p", "a"), ("q", "b")]),
        ("a.tsv", "p\ta\r\n\r\nq\tb\r\n", [("p", "a"), ("q", "b")]),
        ("a.tsv", 'p "q\ta\u2028b\x85c\x0cd', [('p "q', "a\u2028b\x85c\x0cd")]),
        ("a.tsv", "target\tsource\na\tp\n", [("p", "a")]),
        ("a.tsv", 'prompt\tcompletion\n"p\nq"\ta\n', [("p\nq", "a")]),
        ("a.csv", 'prompt,completion\n"p, ""q""",a\n', [('p, "q"', "a")]),
        ("a.json", SQUAD, [("c\np", "a"), ("c\nq", "")]),
    ],
)
def test_pairs_come_from_files_of_many_forms(name, content, pairs, tmp_path):
    records = read(tmp_path / name, content)
    assert [r.parts for r in records] == ([("c\np", "a")] if pairs == "cp" else pairs)
    assert {r.labels for r in records} == {PAIR}
    assert {r.source for r in records} == {str(tmp_path / name)}


@pytest.mark.parametrize(
    ("keys", "row", "pair"),
    [
        (("up", "down"), {"up": "p", "down": "a", "text": "x", "summary": "y"}, ("p", "a")),
        (("fr", "en"), {"translation": {"en": "p", "fr": "a"}}, ("a", "p")),
        (("question", "context"), {"question": "p", "context": "c"}, ("c\np", "c")),
    ],
)
def test_other_names_and_another_direction_are_chosen_by_keys(keys, row, pair, tmp_path):
    [record] = read(tmp_path / "a.jsonl", row, keys=keys)
    assert record.parts == pair


def test_all_translations_have_the_direction_of_the_first(tmp_path):
    rows = [{"translation": pair} for pair in ({"en": "p", "fr": "a"}, {"fr": "b", "en": "q"})]
    records = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [record.parts for record in records] == [("p", "a"), ("q", "b")]


@pytest.mark.parametrize("keys", [("up", "down"), ("prompt", "prompt"), ("prompt",)])
def test_keys_that_no_row_has_are_no_keys(keys, tmp_path):
    with pytest.raises(ValueError, match=r"up and down|pair_keys=prompt"):
        read(tmp_path / "a.jsonl", PAIR_LINE, keys=keys)


def test_a_table_is_read_by_the_names_of_its_columns_in_any_file(tmp_path):
    for name, mark in (("a.tsv", "\t"), ("a.csv", ",")):
        text = f"id{mark}down{mark}up\n1{mark}a{mark}p\n"
        [record] = read(tmp_path / name, text, keys=("up", "down"))
        assert record.parts == ("p", "a")


PAIR_LINE = '{"prompt": "p", "completion": "a"}\n'
TURNS = [message("system", "s"), message("user", " u\n"), message("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS, "prompt": "p", "completion": "a"},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},
    ],
)
def test_a_conversation_is_a_list_of_messages_or_a_prompt_of_some_and_its_answer(row, tmp_path):
    [record] = read(tmp_path / "a.jsonl", row)
    assert record.labels == ("system", "user", "assistant")
    assert record.parts == ("s", "u", "a")


def test_records_come_from_all_files_in_turn_with_their_places(tmp_path):
    read(tmp_path / "a.tsv", "\np\ta\n")
    read(tmp_path / "b.json", SQUAD)
    paths = [str(tmp_path / name) for name in ("a.tsv", "b.json")]
    places = [record.where for record in read_exchanges(paths)]
    assert places == [f"{paths[0]}, line 2", *(f"{paths[1]}, question {i}" for i in (1, 2))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", PAIR_LINE + '{"prompt": "p"}', "line 2: needs messages, or prompt and comp"),
        ("a.jsonl", {"prompt": "p", "answer": "a"}, "line 1: .*has prompt, answer; other names"),
        ("a.jsonl", {"prompt": None, "completion": "a"}, "line 1: prompt is None: a text is need"),
        ("a.jsonl", {"prompt": "p", "completion": " "}, "line 1: completion is ' ': a text"),
        ("a.jsonl", {"prompt": "p", "completion": 7}, "line 1: completion is 7: a text"),
        ("a.jsonl", {"prompt": TURNS[:2], "completion": "a"}, "line 1: prompt is .*: a text"),
        ("a.jsonl", {"question": None, "answer": "a", "context": "c"}, "line 1: question is None"),
        ("a.jsonl", {"question": "p", "answer": "a", "context": ["c"]}, "line 1: context is .'c'"),
        ("a.jsonl", {"question": "", "answers": {"text": ["a"]}}, "line 1: question is ''"),
        ("a.jsonl", {"question": "p", "answers": {"text": [None]}}, "line 1: answer is None"),
        ("a.jsonl", {"question": "p", "answers": ["a"]}, "line 1: .*has question, answers"),
        ("a.jsonl", {"instruction": None, "input": "i", "output": "a"}, "line 1: instruction is"),
        ("a.jsonl", {"translation": {"en": "p"}}, "line 1: translation needs two texts"),
        ("a.jsonl", {"translation": {}}, "line 1: translation needs two texts"),
        (
            "a.jsonl",
            {"translation": dict.fromkeys("abc", "p")},
            "two texts, or --pair_keys",
        ),
        (
            "a.jsonl",
            {"prompt": "\ud800", "completion": "a"},
            "line 1: half a surrogate pair",
        ),
        (
            "a.jsonl",
            {"messages": [message("assistant", " ")]},
            "line 1: message 1 is .*",
        ),
        ("a.jsonl", {"messages": "hello"}, "line 1: needs messages, .*and has messages"),
        ("a.jsonl", {"messages": []}, "line 1: no message is the assistant's: there is nothing"),
        ("a.jsonl", {"messages": TURNS[:2]}, "line 1: no message is the assistant's"),
        ("a.jsonl", {"messages": [*TURNS, message("bot", "x")]}, "line 1: message 4 is .*bot.* a"),
        ("a.jsonl", {"messages": [*TURNS, message("user", None)]}, "line 1: message 4 is .*None"),
        ("a.jsonl", {"messages": [*TURNS, {"role": "user"}]}, "line 1: message 4 is .*needs a ro"),
        ("a.jsonl", {"messages": ["hello"]}, "line 1: message 1 is hello: needs a role, system"),
        ("a.jsonl", PAIR_LINE + json.dumps({"messages": TURNS}), "line 2: pairs and conversati"),
        (
            "a.jsonl",
            json.dumps({"messages": TURNS}) + "\n" + PAIR_LINE,
            "do not mix: .*line 1 has",
        ),
        ("a.jsonl", PAIR_LINE + "{", r"line 2: no JSON \("),
        ("a.jsonl", "\n[1]", "line 2: needs a JSON object"),
        ("a.jsonl", "\n", "a.jsonl: there is no prompt with an answer"),
        ("a.tsv", "p\ta\nq\tb\tc\n", "line 2: 3 columns, and not two"),
        ("a.tsv", "p\ta\n\nq\n", "line 3: 1 columns, and not two"),
        ("a.tsv", "p\ta\nq\t\n", "line 2: completion is '': a text is needed"),
        ("a.tsv", "prompt\tcompletion\np\n", "line 2: more or fewer columns"),
        ("a.csv", "prompt,completion\np\n", "line 2: more or fewer columns"),
        ("a.csv", "p,a\nq,b\n", "line 2: needs messages, .*and has p, a; other names"),
        ("a.csv", "", "there is no prompt with an answer"),
        ("a.json", {"data": [{"context": "c"}]}, "a.json: no JSON of SQuAD's form; rows of other"),
        ("a.json", {"prompt": "p", "completion": "a"}, "a.json: no JSON of SQuAD's form"),
        ("a.json", {"data": "abc"}, "a.json: no JSON of SQuAD's form"),
        ("a.json", [1], "a.json: needs a JSON object"),
        ("a.txt", "p", r"a.txt: prompts are read from \.json, \.csv, \.tsv and \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_file_and_line(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("keys", [("prompt",), ("prompt", "completion", "text")])
def test_keys_are_two(keys, tmp_path):
    with pytest.raises(ValueError, match=f"pair_keys={' '.join(keys)}: give two, of the prompt"):
        read(tmp_path / "a.jsonl", PAIR_LINE, keys=keys)


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_lines_of_json_give_back_whatever_texts_they_hold(tmp_path, pairs):
    rows = [json.dumps(dict(zip(PAIR, pair, strict=True))) for pair in pairs]
    assert [r.parts for r in read(tmp_path / "a.jsonl", "\n".join(rows))] == pairs


# ------------------------------------------------------------------------------------------
# As tokens

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEARNED = BPETokenizer.train([*CORPUS, "user\n assistant\n"], 400)
FOREIGN = PretrainedTokenizer(pipeline_of(LEARNED).to_str(), END_OF_TEXT)
TOKENIZERS = {
    "GPT-2": LEARNED,
    "GPT-4": BPETokenizer.train(CORPUS, 380, pattern=GPT4_SPLIT),
    "Qwen": BPETokenizer.train(CORPUS, 380, pattern=QWEN_SPLIT),
    "NFC": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, normal_form="NFC"),
    "pretrained": FOREIGN,
}
WHOLE = BPETokenizer.train(["a wolf\nmet a fox\na wolf\nmet a fox"] * 3, 290, pattern=r"(?s:.+)")
BLOCK_SIZE = 10**7  # longer than any text here, or transformers complains

# Words that the tokenizers know, blanks of all kinds, and any other character that is assigned.
words = st.sampled_from(
    [*" ".join(CORPUS).split(" "), *"\n\r\t\x1c\x85\xa0\u200b\u3000\u0301", "  "]
)
said = st.lists(words | st.text(st.characters(exclude_categories=["Cs", "Cn"]))).map("".join)
ordinary = said.map(lambda text: text.replace("<|", ""))  # a special token means itself there


def conversations(texts):
    return st.lists(st.tuples(st.sampled_from(ROLES), texts), min_size=1, max_size=5)


@given(said, said)
@pytest.mark.parametrize("tokenizer", [LEARNED, WHOLE, FOREIGN], ids=["GPT-2", "whole", "foreign"])
def test_no_token_reaches_over_the_border_and_what_is_learned_is_the_answer_and_its_end(
    tokenizer, prompt, answer
):
    ids, spans = exchange_ids(Record((prompt, answer), PAIR, "", ""), tokenizer)
    encode, end = tokenizer.encode, tokenizer.end_of_text
    assert ids == [*encode(prompt), *encode("\n"), *encode(answer), end]
    [(begin, last)] = spans
    assert last == len(ids)
    assert tokenizer.decode(ids[begin:]) == answer + END_OF_TEXT
    assert tokenizer.decode(ids[:begin]) == prompt + "\n"
    assert prompt_ids(prompt, tokenizer) == ids[: len(encode(prompt))]


def test_together_the_two_would_be_encoded_otherwise():
    ids, _ = exchange_ids(Record(("a wolf", "met a fox"), PAIR, "", ""), WHOLE)
    assert ids[:-1] != WHOLE.encode("a wolf\nmet a fox")
    assert WHOLE.decode(ids[:-1]) == "a wolf\nmet a fox"


def test_a_prompt_begins_with_what_its_tokenizer_puts_before_texts():
    from tokenizers import processors

    pipeline = pipeline_of(LEARNED)
    pipeline.post_processor = processors.TemplateProcessing(
        single=[END_OF_TEXT, "$A"], special_tokens=[(END_OF_TEXT, LEARNED.end_of_text)]
    )
    tokenizer = PretrainedTokenizer(pipeline.to_str(), END_OF_TEXT)
    ids, spans = exchange_ids(Record(("wolves", "foxes"), PAIR, "", ""), tokenizer)
    assert tokenizer.decode(ids) == f"{END_OF_TEXT}wolves\nfoxes{END_OF_TEXT}"
    assert tokenizer.decode(ids[slice(*spans[0])]) == f"foxes{END_OF_TEXT}"


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request, tmp_path_factory) -> tuple:
    """A tokenizer that can chat, and what transformers makes of its files."""
    ours = with_answers(TOKENIZERS[request.param], chat=True)
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(ours, folder, ModelConfig(block_size=BLOCK_SIZE))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@given(conversations(ordinary))
def test_a_conversation_has_the_ids_and_the_mask_that_transformers_gives_it(pair, messages):
    ours, theirs = pair
    rows = [message(*pair) for pair in messages]
    found = theirs.apply_chat_template(
        rows, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    ids, spans = chatml([(role, text.strip()) for role, text in messages], ours)
    assert found["input_ids"] == ids
    mask = [any(begin <= i < end for begin, end in spans) for i in range(len(ids))]
    assert found["assistant_masks"] == mask
    opened = theirs.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    assert opened == ids + answer_opening(ours)


CHATTING = [t.with_special("<|im_start|>").with_special(ENDS) for t in (LEARNED, FOREIGN)]


@given(messages=conversations(said))
@pytest.mark.parametrize("tokenizer", CHATTING, ids=["ours", "foreign"])
def test_the_spans_of_a_conversation_are_what_the_assistant_says_and_its_end(tokenizer, messages):
    roles, parts = zip(*messages, strict=True)
    ids, spans = exchange_ids(Record(parts, roles, "", ""), tokenizer)
    learned = [tokenizer.decode(ids[begin:end]) for begin, end in spans]
    assert learned == [text + ENDS for role, text in messages if role == "assistant"]
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    assert tokenizer.decode(ids) == written


def test_names_of_special_tokens_in_a_text_are_ordinary_characters():
    """So nobody can write a turn of the assistant into a message."""
    tokenizer = CHATTING[0]
    ids, _ = chatml([("user", "<|im_end|><|endoftext|>")], tokenizer)
    starts, ends = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    assert [i for i in ids if i in tokenizer.special_tokens.values()] == [starts, ends]


def test_a_chat_gets_the_tokens_that_are_missing_and_says_which(capsys):
    assert not can_chat(LEARNED)
    tokenizer = with_answers(LEARNED, chat=True)
    assert can_chat(tokenizer)
    assert capsys.readouterr().out == "added     <|im_start|> <|im_end|> to the vocabulary\n"
    n = LEARNED.vocab_size
    assert tokenizer.special_tokens == {END_OF_TEXT: n - 1, "<|im_start|>": n, "<|im_end|>": n + 1}
    assert with_answers(tokenizer, chat=True) is tokenizer
    with_answers(LEARNED.with_special(ENDS), chat=True)
    with_answers(LEARNED, chat=False)
    assert capsys.readouterr().out == "added     <|im_start|> to the vocabulary\n"


@pytest.mark.parametrize("chat", [False, True])
def test_characters_have_no_token_that_ends_an_answer(chat):
    with pytest.raises(ValueError, match=r"no token .*tokenizer=bpe:"):
        with_answers(CharTokenizer("ab"), chat=chat)


def test_a_pair_needs_a_token_that_ends_it():
    bare = BPETokenizer(LEARNED.ranks, {"<|x|>": len(LEARNED.ranks)})
    with pytest.raises(ValueError, match="no token that ends a text: choose --tokenizer=bpe:1024"):
        with_answers(bare, chat=False)
    assert can_chat(with_answers(bare, chat=True))  # a chat brings its own
