"""Look inside a model: python -m nanolm.lab.look [--out_dir=RUN] --text="..." [--key=value ...]

Writes a folder with one page, index.html, which needs nothing else, and pictures of the same.
"""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from nanolm.bpe import merge_steps
from nanolm.lab.pictures import draw
from nanolm.lab.trace import guesses_of_hidden, lens, shares, surprise, trace
from nanolm.model import count_parameters
from nanolm.runs.folder import newest_run
from nanolm.runs.load import Trained, load_model
from nanolm.sampling import generate
from nanolm.system.config import load_config
from nanolm.system.files import write_text
from nanolm.system.script import run_script
from nanolm.tasks.answering import AnsweringTask, stop_ids
from nanolm.tasks.causal import encode_prompt
from nanolm.tasks.labelled import LabelledTask
from nanolm.tasks.masked import MaskedTask, framed_text
from nanolm.text.bpe_tokenizer import BPETokenizer
from nanolm.text.documents import text_or_file
from nanolm.text.pretrained import PretrainedTokenizer, open_pipeline
from nanolm.text.tokenizer import Tokenizer, mask_of

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("look.html")
GUESSES, FEWER = 10, 3  # tokens that are shown as guesses, at the end and after each layer
ANSWER = 100  # tokens, at most, of an answer that the model writes
LINKS = 5  # keys that are shown of a query
MAPS = 1_000_000  # weights in all maps of a kind: where there are more, they are made coarser


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """The keys of the command."""

    texts = ("text", "answer")

    init_from: str = "resume"  # resume (the run in out_dir) | gpt2 | FOLDER | OWNER/NAME
    out_dir: str | None = None  # the run; None: the one in out/ that was trained last
    text: str | None = None  # what the model reads, or FILE:text.txt
    answer: str | None = None  # completion, seq2seq: what it is to answer; None: what it does
    folder: str = "look"  # where the page is written


def look(trained: Trained, text: str, answer: str | None = None) -> dict[str, Any]:
    """All that the page shows of a model and a text, as JSON has it.

    Raises ValueError for a text that the model cannot read.
    """
    model, tokenizer, origin, task = trained
    inputs = ask(trained, text, answer)
    found, shown = trace(model, inputs), {}
    for key, name in (("source", "source"), ("ids", "text")):
        if key in inputs:
            norms = torch.stack([x.norm(dim=-1) for x in found.streams[name]])  # (layers + 1, T)
            shown[name] = {"ids": inputs[key][0].tolist(), "norms": rounded(norms, 2)}
    labelled = isinstance(task, LabelledTask)
    tell = tell_labels if labelled else tell_guesses
    shown["text"] |= tell(trained, inputs, found.logits, found.streams["text"])
    known = {i for text in shown.values() for i in text["ids"]}
    rows = () if labelled else chain(shown["text"]["guesses"], *shown["text"]["lens"])
    used = known.union(i for row in rows for i, _ in row)
    size = f"{model.config.n_layer} layers, {model.config.n_head} heads"
    return {
        "title": origin,
        "model": f"{model.config.kind} of {count_parameters(model):,} parameters: {size}",
        "hidden": isinstance(task, MaskedTask),
        "texts": shown,
        "vocabulary": {i: spelled(i, tokenizer, steps=i in known) for i in sorted(used)},
        "attention": {name: packed(layers) for name, layers in found.attention.items()},
    }


# ------------------------------------------------------------------------------------------
# What the model reads


def ask(trained: Trained, text: str, answer: str | None) -> dict[str, Tensor]:
    """The arguments of forward for one text: what the model's task makes of it."""
    model, tokenizer, _, task = trained
    size = model.config.block_size
    if answer is not None and not isinstance(task, AnsweringTask):
        raise ValueError(f"answer={answer!r}: this model was not trained to answer texts")
    if isinstance(task, LabelledTask):
        batch = task.question(text, tokenizer)
        if "places" in batch and not batch["places"].size:
            raise ValueError(f"text={text!r}: there is no word in it")
        n = int(batch["mask"].sum()) if "mask" in batch else len(batch["ids"][0])
        inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
        return {key: x if key == "places" else x[:, :n] for key, x in inputs.items()}
    if isinstance(task, AnsweringTask):
        asked = cut({"ids": torch.tensor([task.question(text, tokenizer)])}, size)["ids"]
        begin, context = task.begin(model, asked)
        if answer is None:
            options = {"temperature": 0.0, "stop_ids": stop_ids(tokenizer)}
            options["max_new_tokens"] = min(ANSWER, size - begin.shape[1])
            written = [step.item() for step in generate(model, begin, **options, **context)]
        else:
            written = tokenizer.encode(answer)
        ids = torch.cat((begin, torch.tensor([written], dtype=torch.long)), dim=1)
        return cut({"ids": ids} | ({"source": asked} if "memory" in context else {}), size)
    encode = framed_text if isinstance(task, MaskedTask) else encode_prompt
    return cut({"ids": torch.tensor([encode(tokenizer, text)])}, size)


def cut(inputs: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The texts, (1, T) each, as far as the model can read them."""
    for ids in inputs.values():
        if ids.shape[1] > size:
            print(
                f"warning: {ids.shape[1]} tokens, of which only the first {size} (block_size) fit"
            )
    return {name: ids[:, :size] for name, ids in inputs.items()}


# ------------------------------------------------------------------------------------------
# What the page shows


def tell_guesses(
    trained: Trained, inputs: dict[str, Tensor], logits: Tensor, stream: Sequence[Tensor]
) -> dict[str, Any]:
    """The model's guesses for each token, its surprise in nats, and its guesses after each layer.

    A decoder guesses a token before it sees it, and one more at the end. From an encoder each is
    hidden in turn; but its guesses after each layer are for a token that it sees.
    """
    model, tokenizer, _, task = trained
    ids, layers = inputs["ids"][0], lens(model, stream, inputs)
    if isinstance(task, MaskedTask):
        first, mask = [], mask_of(tokenizer)
        logits = guesses_of_hidden(model, ids, mask)
        nats = surprise(logits, ids).masked_fill(ids == mask, math.nan)
    else:
        first = [[]]  # none for the first token
        nats = torch.cat((torch.tensor([math.nan]), surprise(logits[:-1], ids[1:])))
    return {
        "surprise": rounded(nats, 4),
        "guesses": first + best(logits, GUESSES),
        "lens": [first + best(each, FEWER) for each in layers],
    }


def tell_labels(
    trained: Trained, inputs: dict[str, Tensor], logits: Tensor, stream: Sequence[Tensor]
) -> dict[str, Any]:
    """The labels' probabilities at each place, also after each layer; what the best rest on."""
    layers = [logits, *lens(trained.model, stream, inputs)]
    probabilities, *each = (rounded(x.float().softmax(dim=-1), 4) for x in layers)
    return {
        "labels": trained.task.labels,
        "places": inputs["places"][0].tolist() if "places" in inputs else [],
        "probabilities": probabilities,
        "lens": each,
        "shares": rounded(shares(trained.model, inputs), 4),
    }


def best(logits: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """The n likeliest of logits, (P, V), each with its probability."""
    top = logits.float().softmax(dim=-1).topk(min(n, logits.shape[-1]))
    rows = zip(top.indices.tolist(), rounded(top.values, 4), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def rounded(x: Tensor, digits: int) -> list:
    """The numbers of a tensor; None for what is none, as JSON has it."""
    if x.dim() > 1:
        return [rounded(row, digits) for row in x]
    return [None if math.isnan(number) else round(number, digits) for number in x.tolist()]


def spelled(i: int, tokenizer: Tokenizer, *, steps: bool) -> list:
    """A token's text, its bytes in hexadecimal, and the steps by which it was merged of these."""
    if i >= tokenizer.vocab_size:  # a model may have more embeddings than there are tokens
        return [f"<{i}>", "", []]
    spelling = tokenizer.decode_bytes([i])
    text = spelling.decode("utf-8", errors="replace")
    if i in tokenizer.special_tokens.values():  # its name is no part of a text
        return [text, "", []]
    return [text, spelling.hex(" "), [*merges_of(i, tokenizer)] if steps else []]


def merges_of(i: int, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """A token's bytes, then what each merge makes of them; nothing, if it is not merged."""
    if isinstance(tokenizer, BPETokenizer):
        for word in merge_steps(tokenizer.decode_bytes([i]), tokenizer.ranks):
            yield [piece.decode("utf-8", errors="backslashreplace") for piece in word]
    elif isinstance(tokenizer, PretrainedTokenizer) and (
        ranks := pretrained_ranks(tokenizer.pipeline)
    ):
        yield from merge_steps(open_pipeline(tokenizer.pipeline).id_to_token(i), ranks)


@lru_cache
def pretrained_ranks(pipeline: str) -> dict[str, int]:
    """The rank of each merge of a tokenizer.json, by the token that it makes."""
    pairs = json.loads(pipeline)["model"].get("merges", ())
    words = ["".join(p.split(" ") if isinstance(p, str) else p) for p in pairs]
    return {word: rank for rank, word in reversed([*enumerate(words)])}  # the first counts


def packed(layers: Sequence[Tensor]) -> dict[str, Any]:
    """The weights of attention, (nh, T, S) of each layer, in few bytes.

    map: all of them, in 255ths; where they are more than MAPS, the largest of each step x step.
    keys, weights: those at which each query looks most, and how much, in 255ths.
    """
    nh, T, S = layers[0].shape
    step = math.ceil(math.sqrt(len(layers) * nh * T * S / MAPS))
    top = [x.topk(min(LINKS, S)) for x in layers]
    return {
        "step": step,
        "shape": [len(layers), nh, T, S, min(LINKS, S)],
        "map": in_base64([in_255ths(max_pool2d(x, step, ceil_mode=True)) for x in layers]),
        "keys": in_base64([each.indices.short() for each in top]),
        "weights": in_base64([in_255ths(each.values) for each in top]),
    }


def in_255ths(x: Tensor) -> Tensor:
    """Numbers from 0 to 1 as bytes."""
    return (x.float() * 255).round().byte()


def in_base64(tensors: Sequence[Tensor]) -> str:
    """The bytes of tensors as characters."""
    return base64.b64encode(b"".join(x.numpy().tobytes() for x in tensors)).decode()


def page(data: dict[str, Any]) -> str:
    """The page, with the data in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text.replace("</", "<\\/"))


def main(arguments: list[str]) -> None:
    """Write the page and the pictures."""
    config = load_config(LookConfig, arguments)
    if config.text is None:
        raise ValueError('text: say what the model is to read, as --text="Some words"')
    text, folder = text_or_file("text", config.text), Path(config.folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).exists():
        raise ValueError(f"folder={config.folder!r}: holds other things; choose a new one")
    resume = config.init_from == "resume"
    name = (config.out_dir or newest_run()) if resume else config.init_from
    data = look(load_model(name), text, config.answer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PAGE, page(data))
        draw(data, folder)
    except OSError as error:
        raise ValueError(
            f"folder={config.folder!r}: cannot be written: {error.strerror}"
        ) from None
    print(f"{data['title']}: open {folder / PAGE} in a browser")


if __name__ == "__main__":
    run_script(main, __doc__, LookConfig)
