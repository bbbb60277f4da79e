"""Sampling: from logits to the next token, and from a model to a stream of tokens.

A model gives a distribution over the next token; drawing from it, appending the token and asking
again writes text. Three options shape the distribution first. A temperature divides the logits:
below 1 the likely becomes likelier, and 0 takes the most likely token always. Top-k keeps the k
most likely tokens (Fan et al. 2018). Top-p keeps the smallest set of most likely tokens whose
probabilities reach p (Holtzman et al. 2020).

One rule holds where the text outgrows the model's context, with a cache or without: the last half
of the context is kept, and read again from position 0. (Dropping one token at a time would need
every key computed anew at every step, because each position would move.)

Where one answer is right, as in translation, one looks for the likeliest text. The likeliest token
each time does not lead there; beam search follows several beginnings side by side.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import count

import torch
from torch import Tensor

from nanolm.attention import KVCache


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Set all but the k largest of the last axis to -inf; None and 0 keep all.

    Where several are equal to the k-th largest, all of them stay.
    """
    if not k or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """Keep the smallest set of most likely tokens (at least one) that together reach p."""
    if p is None or p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all the likelier ones
    dropped = before >= p
    dropped[..., 0] = False  # also where p is so small that it is 0 in the logits' precision
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def sample_next(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row: logits (B, V) -> ids (B,). Temperature 0: the largest logit."""
    if temperature < torch.finfo(torch.float32).tiny:  # there is no dividing by it in fp32
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # so that no quotient overflows
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    cache: list[KVCache] | None = None,
    **context: Tensor,
) -> Iterator[Tensor]:
    """Continue the prompts ids, (B, T) with T >= 1: yields the next token of each row, (B,).

    Of a prompt longer than the model's context, its end counts. A row that has drawn one of
    stop_ids repeats it, and is no longer computed; the stream ends when all rows have, or after
    max_new_tokens. cache: one that holds the beginning of prompts which fit into the context, and
    is filled further. context: what else the model is to be given each time, with a row for each
    prompt; by segments, (B, T), prompts of different lengths are filled up at the left (see
    Transformer.forward). It should be in eval mode. Raises ValueError for
    options out of range.
    """
    check_generation_options(max_new_tokens, temperature, top_k, top_p)
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token to start from")
    stop = torch.tensor(list(stop_ids), device=ids.device)
    drawn, rows = ids[:, -1].clone(), torch.arange(len(ids), device=ids.device)
    block_size = model.config.block_size
    text = ids[:, -block_size:]  # of the rows that go on
    cache = cache or model.new_cache(min(block_size, text.shape[1] + max_new_tokens))
    unread = text[:, cache[0].length :]
    for _ in range(max_new_tokens):
        if text.shape[1] > block_size:
            text = text[:, -max(1, block_size // 2) :]
            cache, unread = model.new_cache(), text
        read, cached = (unread, {"cache": cache}) if use_cache else (text, {})
        if "segments" in context:
            context["segments"] = context["segments"][:, -text.shape[1] :]
        logits, _ = model(read, **cached, **context)  # (B, T, V)
        unread = sample_next(
            logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )[:, None]
        drawn[rows] = unread[:, 0]
        yield drawn.clone()
        text = torch.cat((text, unread), dim=1)
        if "segments" in context:  # a new token is of the last one of its row
            segments = context["segments"]
            context["segments"] = torch.cat((segments, segments[:, -1:]), dim=1)
        if len(stop) and len(on := (~torch.isin(unread[:, 0], stop)).nonzero()[:, 0]) < len(rows):
            if not len(on):
                return
            rows, text, unread = rows[on], text[on], unread[on]
            context = {name: x[on] for name, x in context.items()}
            for layer in cache if use_cache else ():
                layer.take(on)


def check_generation_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise ValueError for an option of generate that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k}: must be at least 1, or 0 for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")


@torch.no_grad()
def beam_search(
    model: torch.nn.Module,
    ids: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    stop_ids: Iterable[int] = (),
    **context: Tensor,
) -> Tensor:
    """The best continuation that is found of one prompt: ids (1, T) -> (length,).

    Of all continuations by one token of the num_beams likeliest texts so far, the likeliest go on
    (Sutskever et al. 2014, section 3.2). One that ends, by one of stop_ids or after max_new_tokens
    tokens, scores its log probability / length ** length_penalty. The search ends when the best
    text that goes on would score no better, if it ended now, than the num_beams best that have
    ended: that is transformers' rule. context: as in generate.
    """
    stop = torch.tensor(list(stop_ids), device=ids.device)
    texts, unread = ids.new_empty(num_beams, 0), ids.expand(num_beams, -1)
    cache, ended = model.new_cache(ids.shape[1] + max_new_tokens), []
    sums = torch.full((num_beams,), -math.inf, device=ids.device)  # log probabilities of the texts
    sums[0] = 0.0  # they all begin alike: one is enough
    for length in range(1, max_new_tokens + 1):
        alike = {name: x.expand(len(unread), *x.shape[1:]) for name, x in context.items()}
        logits, _ = model(unread, cache=cache, **alike)
        totals = sums[:, None] + logits[:, -1].float().log_softmax(dim=-1)  # (num_beams, V)
        best = totals.flatten().topk(min(totals.numel(), num_beams * max(2, 1 + len(stop))))
        beams, tokens = best.indices // totals.shape[1], best.indices % totals.shape[1]
        longer = torch.cat((texts[beams], tokens[:, None]), dim=1)
        ends = torch.isin(tokens, stop) | (length == max_new_tokens)
        scores = (best.values / length**length_penalty).tolist()
        ended += [(scores[i], longer[i]) for i in range(num_beams) if ends[i]]
        ended = sorted(ended, key=lambda pair: pair[0], reverse=True)[:num_beams]
        on = (~ends).nonzero()[:num_beams, 0]
        if not len(on) or (len(ended) == num_beams and scores[on[0]] <= ended[-1][0]):
            break
        sums, texts, unread = best.values[on], longer[on], tokens[on, None]
        for layer in cache:
            layer.take(beams[on])
    return ended[0][1] if ended else texts[0]


def rows_of(steps: Iterable[Tensor], n: int) -> list[Iterator[int]]:
    """The tokens of each of the n rows that generate draws side by side, as streams of their own.

    Taking a token from one row lets all of them grow, and the others keep theirs until they are
    taken: so the first row can be shown while it is drawn, and nothing is drawn that no row needs.
    """
    steps, drawn = iter(steps), []

    def row(number: int) -> Iterator[int]:
        for position in count():
            if position == len(drawn):
                step = next(steps, None)
                if step is None:
                    return
                drawn.append(step.tolist())
            yield drawn[position][number]

    return [row(number) for number in range(n)]


def until(pieces: Iterable[str], stop: str | None) -> Iterator[str]:
    """Pass pieces of text on until the text stop appears in them, across pieces too.

    What could still become the stop text is held back until it is decided; the stop text itself is
    not passed on.
    """
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        safe = len(held) - longest_overlap(held, stop or "")
        yield held[:safe]
        held = held[safe:]
    yield held


def longest_overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of stop that text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
