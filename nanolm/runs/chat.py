"""A conversation in a terminal, with a model that was trained on conversations."""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nanolm.attention import KVCache
from nanolm.model import GPT
from nanolm.sampling import generate
from nanolm.system.files import append_text
from nanolm.system.signals import Stopped, handled_by
from nanolm.tasks.answering import stop_ids
from nanolm.text.conversations import ASSISTANT, USER, Message, answer_opening, can_chat, chatml
from nanolm.text.tokenizer import Tokenizer, stream_text

HELP = "/clear begins anew, /save FILE adds the conversation to it, /quit or Ctrl-D ends it"


@dataclass
class Chat:
    """What was said, and the keys and values of it, so that no turn is read twice.

    options: those of generate. Raises ValueError for a model that knows no conversations.
    """

    model: GPT
    tokenizer: Tokenizer
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    read: list[int] = field(default_factory=list)  # the ids that the cache holds
    cache: list[KVCache] | None = None

    def __post_init__(self):
        if self.model.config.kind != "a decoder" or not can_chat(self.tokenizer):
            raise ValueError(
                "chat needs a decoder that was trained on conversations: rows of messages, as "
                "config/chat_pyhelp.py trains on"
            )

    def say(self, text: str) -> Iterator[str]:
        """The model's answer, in pieces; it is kept as far as it is taken.

        The model does not see the oldest messages where all do not fit. Raises ValueError for a
        text that is too long by itself.
        """
        messages, room = [*self.messages, (USER, text)], self.model.config.block_size
        seen = messages
        ids = self.ids(seen)
        while len(ids) >= room and len(seen) > 1:
            seen = seen[1:]
            ids = self.ids(seen)
        if len(ids) >= room:
            raise ValueError(f"{len(ids)} tokens: the context has {room} (block_size)")
        self.messages = messages
        self.settle(ids)
        said, prompt = [], torch.tensor([ids], device=self.model.head.weight.device)
        limit = min(self.options["max_new_tokens"], room - len(ids))
        stop = stop_ids(self.tokenizer)
        keys = ("temperature", "top_k", "top_p", "generator")
        options = {key: self.options[key] for key in keys if key in self.options}
        options |= {"max_new_tokens": limit, "stop_ids": stop, "cache": self.cache}

        def drawn() -> Iterator[int]:
            for step in generate(self.model, prompt, **options):
                self.read = (ids + said)[: self.cache[0].length]
                said.append(int(step))
                yield said[-1]

        pieces = []
        try:
            for piece in stream_text(self.tokenizer, takewhile(lambda i: i not in stop, drawn())):
                pieces.append(piece)
                yield piece
        finally:  # also where nobody takes the rest
            self.messages.append((ASSISTANT, "".join(pieces).strip()))

    def ids(self, messages: list[Message]) -> list[int]:
        """The ids of what was said, and of what opens an answer."""
        return chatml(messages, self.tokenizer)[0] + answer_opening(self.tokenizer)

    def settle(self, ids: list[int]) -> None:
        """Let the cache hold no more than what these ids begin with, and not all of them."""
        if self.cache is None:
            self.cache = self.model.new_cache()
        pairs = zip(self.read, ids[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for layer in self.cache:
            layer.length = kept
        self.read = self.read[:kept]  # what comes now is written over the rest

    def clear(self) -> None:
        """Forget what was said."""
        self.messages, self.read = [], []

    def save(self, path: Path) -> None:
        """Add the conversation to a file, as a line of JSON, which can be trained on."""
        content = {"messages": [{"role": role, "content": text} for role, text in self.messages]}
        append_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def talk(chat: Chat) -> None:
    """Read lines and answer them, until their end. Ctrl-C ends an answer, and then the talk."""
    print(HELP)
    with handled_by(signal.default_int_handler, [signal.SIGINT]):
        while (line := next_line()) is not None:
            if not answer_line(chat, line):
                return


def next_line() -> str | None:
    """What a person says next; None where nothing more comes."""
    try:
        return input("> ").strip()
    except Stopped:
        raise
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def answer_line(chat: Chat, line: str) -> bool:
    """Do what a line asks for; whether the talk goes on."""
    command, _, path = line.partition(" ")
    if command == "/clear":
        chat.clear()
    elif command == "/save":
        save(chat, path.strip())
    elif command.startswith("/") and command != "/quit":
        print(HELP)
    elif line and command != "/quit":
        show_answer(chat, line)
    return command != "/quit"


def save(chat: Chat, path: str) -> None:
    """Save a conversation, or say why that cannot be."""
    if not path or not chat.messages:
        print("nothing was said" if path else "/save FILE: name a file")
        return
    try:
        chat.save(Path(path).expanduser())
        print(f"saved in {path}")
    except OSError as error:
        print(f"not saved in {path}: {error.strerror}")


def show_answer(chat: Chat, line: str) -> None:
    """Print an answer as it comes."""
    pieces = chat.say(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except Stopped:
        raise
    except KeyboardInterrupt:
        pieces.close()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    print()
