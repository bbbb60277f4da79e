"""Laws of a conversation in a terminal."""

import json
import os
import signal
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_model, seeds, torch_seeded

from nanolm.layers import ModelConfig
from nanolm.runs.chat import HELP, Chat, talk
from nanolm.sampling import generate
from nanolm.system.signals import Stopped
from nanolm.tasks.answering import stop_ids
from nanolm.text.conversations import answer_opening, chatml, read_exchanges, with_answers
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer

WORDS = ["the wolf", "met", "a fox", "and", "ran", "fast!", "who?"]
BARE = BPETokenizer.train([" ".join(WORDS), "user\nassistant\n"] * 3, 310)
TOKENIZER = with_answers(BARE, chat=True)
BLOCK_SIZE = 72
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, block_size=BLOCK_SIZE, n_layer=2, n_head=2, n_embd=8
)
LONG = "fast! " * BLOCK_SIZE


def model_of(seed: int, *, brief: float = 1.0, **keys):
    """A random model. brief: how much louder than others are the tokens that end an answer."""
    torch.manual_seed(seed)
    model = random_model(ModelConfig(**vars(CONFIG) | keys), seed)
    model.tokens.weight.data[stop_ids(TOKENIZER)] *= brief
    return model


def chat_with(model, messages=(), **options) -> Chat:
    options = {"max_new_tokens": 12, "temperature": 0.0, "top_k": None, "num_beams": 1} | options
    return Chat(model, TOKENIZER, options, list(messages))


def ids_of(messages) -> list[int]:
    return chatml(messages, TOKENIZER)[0] + answer_opening(TOKENIZER)


@contextmanager
def interrupted(model, step: int, interrupt):
    """Within this, interrupt is called in the middle of a step, counted from 0."""
    steps = iter(range(10**6))

    def hook(*_):
        if next(steps) == step:
            interrupt()

    handle = model.blocks[1].register_forward_pre_hook(hook)
    yield
    handle.remove()


def press_ctrl_c():
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------
# What is said

# What a person says, how many pieces of the answer are taken, and in which step Ctrl-C comes.
turns = st.tuples(
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.none() | st.integers(1, 6),
    st.none() | st.integers(0, 5),
)
positions = st.sampled_from(["learned", "rotary"])


@settings(max_examples=40)
@given(st.lists(turns, min_size=1, max_size=6), seeds, positions)
def test_an_answer_is_the_one_to_the_whole_conversation_read_anew(said, seed, position):
    """Whatever the cache has kept: after answers that were broken off, and forgotten messages."""
    model = model_of(seed, position=position, brief=3.0)
    chat = chat_with(model)
    for text, taken, step in said:
        before = list(chat.messages)
        pieces, found = chat.say(text), []
        with interrupted(model, -1 if step is None else step, press_ctrl_c):
            with suppress(KeyboardInterrupt):
                for piece in pieces:
                    found.append(piece)
                    if len(found) == taken:
                        break
            pieces.close()
        *kept, (user, asked), (assistant, answer) = chat.messages
        assert (user, asked, assistant) == ("user", text, "assistant")
        assert kept == before[len(before) - len(kept) :]
        anew = chat_with(model, before)
        whole = list(anew.say(text))
        assert anew.messages[:-1] == chat.messages[:-1]
        assert answer == "".join(found).strip()
        assert found == whole[: len(found)]
        assert found == whole or (taken, step) != (None, None)


def test_ctrl_c_while_a_prompt_is_read_does_not_spoil_what_the_cache_holds():
    """The first layer held the new prompt then, and the list of what was read the old one."""
    model = model_of(2)
    chat = chat_with(model)
    list(chat.say("the wolf met a fox"))
    held = list(chat.read)
    chat.messages = []  # another conversation, whose beginning is the same
    with interrupted(model, 0, press_ctrl_c), suppress(KeyboardInterrupt):
        list(chat.say("the wolf ran and ran and ran"))
    assert len(chat.read) < len(held)
    chat.messages = []
    found = "".join(chat.say("the wolf met a fox"))
    assert found == "".join(chat_with(model).say("the wolf met a fox"))


@given(seeds)
@settings(max_examples=20)
def test_an_answer_is_what_generate_writes_after_the_conversation_without_a_cache(seed):
    model, messages = (
        model_of(seed, brief=3.0),
        [("user", "who?"), ("assistant", "a fox"), ("user", "met")],
    )
    options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "max_new_tokens": 12}
    chat = chat_with(model, messages[:-1], **options, generator=torch_seeded(seed))
    found = "".join(chat.say("met"))
    stop = stop_ids(TOKENIZER)
    options |= {"generator": torch_seeded(seed), "stop_ids": stop, "use_cache": False}
    ids = [int(i) for i in generate(model, torch.tensor([ids_of(messages)]), **options)]
    assert found == TOKENIZER.decode([i for i in ids if i not in stop])
    assert chat.messages == [*messages, ("assistant", found.strip())]


def test_no_turn_is_read_twice(monkeypatch):
    model = model_of(0)
    read, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **keys: read.append(ids.shape[1]) or forward(ids, **keys)
    )
    chat = chat_with(model, max_new_tokens=4)
    for text in ("who?", "a fox", "and"):
        first = len(read)
        before = ids_of(chat.messages)[: -len(answer_opening(TOKENIZER))]
        list(chat.say(text))
        whole = len(ids_of(chat.messages[:-1]))
        assert set(read[first + 1 :]) <= {1}
        if not chat.messages[:-2]:
            assert read[first] == whole
        else:  # what the last answer has added may be read again, as it is shown
            answer = len(TOKENIZER.encode(chat.messages[-3][1])) + 2  # its end, and a line's
            assert read[first] <= whole - len(before) + answer


@given(
    st.lists(st.tuples(*[st.lists(st.sampled_from(WORDS)).map(" ".join)] * 2), max_size=8), seeds
)
@settings(max_examples=40)
def test_the_oldest_messages_are_not_seen_and_no_more_than_has_no_room(pairs, seed):
    """But they are kept."""
    messages = [turn for a, b in pairs for turn in (("user", a), ("assistant", b))]
    model, options = model_of(seed, brief=3.0), {"max_new_tokens": 500}
    chat = chat_with(model, messages, **options)
    answer = "".join(chat.say("who?"))
    *kept, (role, said) = chat.messages
    assert kept == [*messages, ("user", "who?")]
    assert (role, said) == ("assistant", answer.strip())
    fitting = [i for i in range(len(kept)) if len(ids_of(kept[i:])) < BLOCK_SIZE]
    assert answer == "".join(chat_with(model, messages[fitting[0] :], **options).say("who?"))


def test_a_text_that_is_too_long_is_refused_and_the_conversation_goes_on():
    messages = [("user", "who?"), ("assistant", "a fox")]
    model = model_of(0)
    chat = chat_with(model, messages)
    with pytest.raises(ValueError, match=rf"\d+ tokens: the context has {BLOCK_SIZE} "):
        list(chat.say(LONG))
    assert chat.messages == messages
    assert "".join(chat.say("ran")) == "".join(chat_with(model, messages).say("ran"))


def test_half_a_character_at_the_end_of_an_answer_is_no_reason_to_fail():
    """Here all answers are one byte of two."""
    model = model_of(0)
    model.head = torch.nn.Linear(8, TOKENIZER.vocab_size).double()
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[TOKENIZER.ranks[b"\xc3"]] = 9
    chat = chat_with(model, max_new_tokens=2)
    assert "".join(chat.say("who?")) == "\ufffd\ufffd"
    pieces = chat.say("who?")
    next(pieces)
    pieces.close()
    assert chat.messages[-1] == ("assistant", "")


@pytest.mark.parametrize(
    ("tokenizer", "keys"),
    [(BARE, {}), (CharTokenizer("ab"), {}), (TOKENIZER, {"n_encoder_layer": 1})],
    ids=["no tokens", "characters", "encoder-decoder"],
)
def test_a_model_that_knows_no_conversations_is_refused(tokenizer, keys):
    with pytest.raises(ValueError, match=r"chat needs a decoder .*config/chat_pyhelp\.py"):
        Chat(random_model(ModelConfig(**vars(CONFIG) | keys), 0), tokenizer, {})


# ------------------------------------------------------------------------------------------
# In the terminal


@pytest.fixture
def terminal(monkeypatch, capsys):
    """terminal(chat, *lines): what a talk prints, on stdout and on stderr.

    A line that is an exception is raised; after the last one the input ends.
    """

    def run(chat: Chat, *lines: object) -> tuple[str, str]:
        left = iter(lines)

        def next_input(prompt: str) -> str:
            assert prompt == "> "
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", next_input)
        talk(chat)
        assert list(left) == []  # nothing was left unread
        return tuple(capsys.readouterr())

    return run


def answers(model, *texts: str, **options) -> list[str]:
    chat = chat_with(model, **options)
    return ["".join(chat.say(text)) for text in texts]


def test_lines_are_answered_until_their_end(terminal):
    model = model_of(1)
    first, second = answers(model, "who?", "met a fox")
    printed, errors = terminal(chat_with(model), " who? ", "", "  ", "met a fox")
    assert printed == f"{HELP}\n{first}\n{second}\n\n"
    assert errors == ""


@pytest.mark.parametrize("last", ["/quit", EOFError(), KeyboardInterrupt()])
def test_a_talk_ends_by_a_word_by_the_end_of_input_and_by_ctrl_c(last, terminal):
    printed, _ = terminal(chat_with(model_of(1)), last)
    assert printed == HELP + ("\n" if last == "/quit" else "\n\n")


def test_after_clear_nothing_is_remembered(terminal):
    model = model_of(1)
    [first] = answers(model, "who?")
    chat = chat_with(model)
    printed, _ = terminal(chat, "the wolf ran", "met", "/clear", "who?")
    assert printed.endswith(f"\n{first}\n\n")
    assert chat.messages == [("user", "who?"), ("assistant", first.strip())]


def test_another_command_is_told_which_there_are(terminal):
    printed, _ = terminal(chat_with(model_of(1)), "/help", "/exit now")
    assert printed == f"{HELP}\n" * 3 + "\n"


def test_what_is_saved_can_be_trained_on(terminal, tmp_path):
    model, path = model_of(1), tmp_path / "über us.jsonl"
    chat = chat_with(model)
    printed, _ = terminal(chat, "who? é", "ran", f"/save  {path} ")
    assert f"saved in {path}\n" in printed
    [record] = read_exchanges([str(path)])
    assert list(zip(record.labels, record.parts, strict=True)) == chat.messages
    assert len(chat.messages) == 4
    [line] = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line).keys() == {"messages"}
    assert "é" in line


def test_conversations_are_added_to_a_file(terminal, workplace):
    lines = ["who?", "/save a.jsonl", "/clear", "ran", "/save a.jsonl", "/clear", "/save a.jsonl"]
    printed, _ = terminal(chat_with(model_of(1)), *lines)
    assert [record.parts[0] for record in read_exchanges(["a.jsonl"])] == ["who?", "ran"]
    assert printed.endswith("nothing was said\n\n")


@pytest.mark.parametrize("path", ["", "nowhere/a.jsonl", "."])
def test_what_cannot_be_saved_is_said_and_the_talk_goes_on(path, terminal, workplace):
    model, before = model_of(1), [("user", "a fox"), ("assistant", "met")]
    printed, _ = terminal(chat_with(model, before), f"/save {path}".strip(), "/clear", "who?")
    _, complaint, answer, *_ = printed.split("\n")
    assert "name a file" in complaint if not path else path in complaint
    assert answer == answers(model, "who?")[0].split("\n")[0]
    assert list(workplace.iterdir()) == []


def test_a_text_that_is_too_long_is_an_error_of_one_line(terminal):
    chat = chat_with(model_of(1))
    _, errors = terminal(chat, LONG, "who?")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert [role for role, _ in chat.messages] == ["user", "assistant"]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_ctrl_c_ends_an_answer_and_the_talk_goes_on(step, terminal):
    """The signal itself; what was said so far is part of the conversation."""
    model = model_of(1)
    whole = list(chat_with(model).say("who?"))
    assert len(whole) > 4
    chat, handler = chat_with(model), signal.getsignal(signal.SIGINT)
    with interrupted(model, step, lambda: os.kill(os.getpid(), signal.SIGINT)):
        printed, _ = terminal(chat, "who?", "ran")
    said = "".join(whole[:step])
    assert chat.messages[:2] == [("user", "who?"), ("assistant", said.strip())]
    answer = "".join(chat_with(model, chat.messages[:2]).say("ran"))
    assert printed == f"{HELP}\n{said}\n{answer}\n\n"
    assert signal.getsignal(signal.SIGINT) == handler


def test_ctrl_c_while_a_piece_is_printed_ends_the_answer_too(terminal, monkeypatch):
    model = model_of(1)
    whole, chat, printed = list(chat_with(model).say("who?")), chat_with(model), []

    def slow_print(*texts, **keys):
        printed.append(texts)
        if len(printed) == 3:  # after the help
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", slow_print)
    terminal(chat, "who?")
    assert chat.messages[1] == ("assistant", "".join(whole[:2]).strip())


@pytest.mark.parametrize("when", ["input", "answer"])
def test_a_signal_to_stop_ends_everything(when, terminal):
    def stop():
        raise Stopped(signal.SIGTERM)

    model = model_of(1)
    lines = [Stopped(signal.SIGTERM)] if when == "input" else ["who?"]
    with interrupted(model, 0, stop), pytest.raises(Stopped):
        terminal(chat_with(model), *lines)
