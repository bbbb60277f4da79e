"""What happens inside a model while it reads a text: where each head looks, how vectors grow.

The model computes what it always does, and hooks note what passes by: all numbers are those of
the plain forward pass. What a vector would mean if the model ended at that layer is read by the
model's own head (the logit lens, nostalgebraist 2020). On which tokens a label rests is told by
the gradient of its log probability with respect to each token's vector, times that vector: what
the vector adds to it, as far as a straight line tells (Shrikumar et al. 2017, section 2.2).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.attention import MultiHeadAttention, attention_weights
from nanolm.layers import Block
from nanolm.model import Transformer

AT_ONCE = 32  # rows of a batch


@dataclass(frozen=True)
class Trace:
    """What one text made a model do. The texts are "text", and of an encoder-decoder "source"."""

    logits: Tensor  # (P, V), of each place that gets an answer
    attention: dict[str, list[Tensor]]  # of each text, and "cross": weights (nh, T, S) by layer
    streams: dict[str, list[Tensor]]  # of each text: (T, C), before the blocks and after each


@torch.no_grad()
def trace(model: Transformer, inputs: dict[str, Tensor]) -> Trace:
    """Let the model read one text. inputs: those of forward, with one row (B = 1)."""
    attention, streams = defaultdict(list), defaultdict(list)
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            whose = "source" if name.startswith("encoder.") else "text"
            if isinstance(layer, MultiHeadAttention):
                kind = "cross" if name.endswith(".cross") else whose
                stack.enter_context(noting_weights(layer, attention[kind]))
            elif isinstance(layer, Block):
                stack.enter_context(noting_stream(layer, streams[whose]))
        logits, _ = model.eval()(**inputs)
    return Trace(logits[0], dict(attention), dict(streams))


@contextmanager
def noting_weights(layer: MultiHeadAttention, into: list[Tensor]) -> Iterator[None]:
    """While this lasts, the layer notes its weights, (nh, T, S), whichever way it computes."""
    attend = layer.attend

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        into.append(attention_weights(q, k, causal=layer.causal, mask=mask)[0])
        return attend(q, k, v, mask)

    layer.attend = noting
    try:
        yield
    finally:
        del layer.attend  # the method is there again


@contextmanager
def noting_stream(block: Block, into: list[Tensor]) -> Iterator[None]:
    """While this lasts, the block notes what it gives; the first one, also what it gets."""

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        into.extend((inputs[0][0], output[0]) if not into else (output[0],))

    handle = block.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def lens(
    model: Transformer, stream: Sequence[Tensor], inputs: dict[str, Tensor]
) -> Iterator[Tensor]:
    """The logits, (P, V), that the head would give before the blocks, and after each of them.

    stream: (T, C) each, of the text whose tokens get answers; inputs: as of trace.
    """
    for x in stream:
        chosen = model.pick(model.norm(x[None]), inputs.get("places"), inputs.get("mask"))
        yield model.head(model.transform(chosen))[0]


@torch.no_grad()
def guesses_of_hidden(model: Transformer, ids: Tensor, mask: int) -> Tensor:
    """Logits, (T, V), at each of the ids, (T,), where that one is hidden behind the mask token."""
    rows = ids.repeat(len(ids), 1).fill_diagonal_(mask)
    places = torch.arange(len(ids), device=ids.device)[:, None]
    parts = zip(rows.split(AT_ONCE), places.split(AT_ONCE), strict=True)
    return torch.cat([model.eval()(part, places=own)[0][:, 0] for part, own in parts])


def surprise(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each of the ids, (T,), in nats. logits: (T, V), the guesses for them."""
    return -logits.float().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]


def shares(model: Transformer, inputs: dict[str, Any]) -> Tensor:
    """What each token adds to the log probability of the likeliest label at each place, (P, T).

    inputs: as of trace. Gradient times input: see above.
    """
    vectors = []
    handle = model.tokens.register_forward_hook(lambda *call: vectors.append(call[-1]))
    try:
        with torch.enable_grad():
            logits, _ = model.eval()(**inputs)
    finally:
        handle.remove()
    best = logits[0].float().log_softmax(dim=-1).amax(dim=-1)  # (P,)
    found = []
    for one in best:
        (gradient,) = torch.autograd.grad(one, vectors, retain_graph=True)  # (1, T, C)
        found.append((gradient * vectors[0]).sum(dim=-1)[0].detach())
    return torch.stack(found)
