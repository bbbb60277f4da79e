"""Texts that answer texts: prompts with their completions, and conversations.

In files, they are rows of many names, which are read here into one form. As tokens, a prompt
stands before its completion on a line of its own, and a conversation is written in ChatML, as
OpenAI had it first: each message between two special tokens, its role on the first line.

    <|im_start|>user
    Who are you?<|im_end|>
    <|im_start|>assistant
    A small model.<|im_end|>

What a model shall learn to write is noted as spans of tokens: completions with the token that ends
them, and what the assistant says with <|im_end|>.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanolm.text.documents import JSON_LINES, json_object, kind_of, read_text
from nanolm.text.records import TABLES, Record, rows_of
from nanolm.text.tokenizer import Tokenizer, existing

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
PAIR = ("prompt", "completion")  # the roles of two texts that are no conversation
# What rows call the two, and a first one's context, which stands before it.
NAMES = (
    PAIR,
    ("text", "summary"),
    ("document", "summary"),
    ("instruction", "output"),
    ("question", "answer"),
    ("source", "target"),
)
CONTEXTS = {"question": "context", "instruction": "input"}
BORDER = "\n"  # between the two
STARTS, ENDS = CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# The same for transformers; the marks of generation say what the assistant says.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = tuple[str, str]  # a role, and what it says
Spans = list[tuple[int, int]]


# ------------------------------------------------------------------------------------------
# In files


def read_exchanges(paths: Iterable[str], *, keys: Sequence[str] = ()) -> list[Record]:
    """The prompts with their completions, or the conversations, of all files.

    keys: what the rows call the two, where it is none of NAMES. The labels of a record are the
    roles of its parts. Raises ValueError for what is neither, with its line.
    """
    if len(keys) not in (0, 2) or len({*keys}) < len(keys):
        raise ValueError(f"pair_keys={' '.join(keys)}: give two, of the prompt and of the answer")
    records = []
    for path in map(Path, paths):
        for where, row in exchange_rows(path, tuple(keys)):
            if isinstance(row.get("translation"), dict):
                row = row["translation"]
                if not keys and len(row) != 2:
                    raise ValueError(f"{where}: translation needs two texts, or --pair_keys")
                keys = keys or tuple(row)  # one direction for all
            roles, parts = zip(*messages_of(row, where, tuple(keys)), strict=True)
            try:
                "".join(parts).encode()
            except UnicodeEncodeError:  # JSON can spell it
                raise ValueError(f"{where}: half a surrogate pair is no character") from None
            records.append(Record(parts, roles, str(path), where))
    if not records:
        raise ValueError(f"{', '.join(paths)}: there is no prompt with an answer")
    check_alike(records)
    return records


def check_alike(records: Sequence[Record]) -> None:
    """Raise ValueError where some are pairs, and others conversations."""
    for record in records:
        if (record.labels == PAIR) != (records[0].labels == PAIR):
            raise ValueError(
                f"{record.where}: pairs and conversations do not mix: {records[0].where} has the "
                "other"
            )


def exchange_rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place."""
    kind = kind_of(path)
    if kind == ".json":
        yield from squad_rows(path)
    elif kind == ".tsv":
        lines = read_text(path).replace("\r\n", "\n").split("\n")  # and nowhere else
        if known_names(dict.fromkeys(lines[0].split("\t")), keys):
            yield from rows_of(path)
            return
        for number, line in enumerate(lines, start=1):
            columns = line.split("\t")
            if line.strip() and len(columns) != 2:
                raise ValueError(f"{path}, line {number}: {len(columns)} columns, and not two")
            if line.strip():
                yield f"{path}, line {number}", dict(zip(PAIR, columns, strict=True))
    elif kind in (JSON_LINES, *TABLES):
        yield from rows_of(path)
    else:
        raise ValueError(f"{path}: prompts are read from .json, .csv, .tsv and {JSON_LINES}")


def squad_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of a file of SQuAD's form (Rajpurkar et al. 2016), with their paragraphs."""
    content = json_object(read_text(path), str(path))
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = {"text": [answer["text"] for answer in question["answers"]]}
                    row = {"context": paragraph["context"], "question": question["question"]}
                    yield f"{path}, question {question.get('id')}", row | {"answers": answers}
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: no JSON of SQuAD's form; rows of other names belong into a {JSON_LINES}"
        ) from None


def known_names(row: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """What a row calls its prompt and its answer, if that is known."""
    return next((pair for pair in ([keys] if keys else NAMES) if set(pair) <= row.keys()), None)


def messages_of(row: dict[str, Any], where: str, keys: tuple[str, ...]) -> list[Message]:
    """The messages of a row: a prompt and its completion, or a conversation."""
    if isinstance(row.get("messages"), list):
        return conversation(row["messages"], where)
    if isinstance(row.get("answers"), dict):  # several are right: the first is to be learned
        texts = row["answers"].get("text") or [""]
        row = row | {"answer": texts[0] if isinstance(texts, list) else texts}
    names = known_names(row, keys)
    if names is None:
        raise ValueError(
            f"{where}: needs messages, or {' and '.join(keys or PAIR)}, and has "
            f"{', '.join(map(str, row))}; other names are chosen by --pair_keys"
        )
    prompt, answer = (row[name] for name in names)
    if isinstance(prompt, list) and isinstance(answer, list):
        return conversation(prompt + answer, where)
    context = CONTEXTS.get(names[0])
    may_be_empty = (context, names[1] if "answers" in row else None)
    for name in (*names, context) if row.get(context) else names:
        text = row[name]
        if not isinstance(text, str) or not (text.strip() or name in may_be_empty):
            raise ValueError(f"{where}: {name} is {text!r}: a text is needed; leave it out")
    if row.get(context):
        parts = (prompt, row[context])
        prompt = "\n".join(parts if names[0] == "instruction" else reversed(parts))
    return list(zip(PAIR, (prompt, answer), strict=True))


def conversation(messages: list[Any], where: str) -> list[Message]:
    """Messages, {"role": ..., "content": ...} each. Raises ValueError where they are none."""
    for number, message in enumerate(messages, start=1):
        known = isinstance(message, dict) and message.get("role") in ROLES
        text = message.get("content") if known else None
        if not isinstance(text, str) or (message["role"] == ASSISTANT and not text.strip()):
            raise ValueError(
                f"{where}: message {number} is {message!s:.60}: needs a role, "
                f"{', '.join(ROLES)}, and a text as content"
            )
    if ASSISTANT not in (message["role"] for message in messages):
        raise ValueError(f"{where}: no message is the assistant's: there is nothing to learn")
    return [(message["role"], message["content"].strip()) for message in messages]


# ------------------------------------------------------------------------------------------
# As tokens


def exchange_ids(record: Record, tokenizer: Tokenizer) -> tuple[list[int], Spans]:
    """The ids of a record, and the spans of what is to be learned."""
    if record.labels != PAIR:
        return chatml(zip(record.labels, record.parts, strict=True), tokenizer)
    prompt = prompt_ids(record.parts[0], tokenizer) + tokenizer.encode(BORDER)
    ids = [*prompt, *tokenizer.encode(record.parts[1]), *existing(tokenizer.end_of_text)]
    return ids, [(len(prompt), len(ids))]


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt, encoded apart, so that no token reaches over the border behind it."""
    return [*existing(tokenizer.begin_of_text), *tokenizer.encode(prompt)]


def chatml(messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], Spans]:
    """The ids of a conversation, and the spans of what the assistant says."""
    starts, ends = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    ids, spans = [], []
    for role, text in messages:
        ids += [starts, *tokenizer.encode(f"{role}\n")]
        begin = len(ids)
        ids += [*tokenizer.encode(text), ends]
        if role == ASSISTANT:
            spans.append((begin, len(ids)))
        ids += tokenizer.encode("\n")
    return ids, spans


def answer_opening(tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant speaks."""
    return [tokenizer.special_tokens[STARTS], *tokenizer.encode(f"{ASSISTANT}\n")]


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the tokens of ChatML."""
    return set(CHAT_TOKENS) <= tokenizer.special_tokens.keys()


def with_answers(tokenizer: Tokenizer, *, chat: bool) -> Tokenizer:
    """The same tokenizer, with what ends an answer, and with the tokens of ChatML for a chat.

    What is added is printed.
    """
    wanted = CHAT_TOKENS if chat else ()
    if not chat and tokenizer.end_of_text is None:
        raise ValueError(
            "the tokenizer has no token that ends a text: choose --tokenizer=bpe:1024"
        )
    missing = [name for name in wanted if name not in tokenizer.special_tokens]
    for name in missing:
        tokenizer = tokenizer.with_special(name)
    if missing:
        print(f"added     {' '.join(missing)} to the vocabulary")
    return tokenizer
