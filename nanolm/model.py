"""The models: token ids become vectors, N blocks add to them, and a head reads them.

A decoder (GPT) looks back alone, and guesses each next token. An encoder looks both ways: it
guesses tokens that are hidden from it, and finds labels for a text or for its words. Joined, they
are the first Transformer: the encoder reads a text, and the decoder, which looks at what has come
of that, writes another. They are made of one block.

The models know nothing of optimizers, files, devices or processes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanolm.attention import KVCache, rotary_angles
from nanolm.layers import NORMS, Block, Dropout, ModelConfig, sinusoids
from nanolm.loss import projected_cross_entropy


class Tower(nn.Module):
    """Token ids -> the last vector of each: embeddings, and n_layer blocks that add to them.

    causal, cross: as of a Block.
    """

    def __init__(self, config: ModelConfig, n_layer: int, *, causal: bool, cross: bool = False):
        super().__init__()
        self.config = config
        C, T = config.n_embd, config.block_size
        self.tokens = nn.Embedding(config.vocab_size, C)
        # Positions: one of three, and only the learned one has weights. Buffers are not saved.
        if config.position == "learned":
            self.positions = nn.Embedding(T, C)
        elif config.position == "sinusoidal":
            self.register_buffer("waves", sinusoids(T, C), persistent=False)
        else:
            cos, sin = rotary_angles(torch.arange(T), config.head_size, config.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.types = nn.Embedding(config.n_types, C) if config.n_types else None
        first, norm = config.norm_first, NORMS[config.norm]
        like_bert = not first and not config.n_encoder_layer
        self.embedding_norm = norm(config) if like_bert else nn.Identity()
        self.dropout = Dropout(config.dropout)
        blocks = (Block(config, causal=causal, cross=cross) for _ in range(n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(config) if first else nn.Identity()  # the last block has normalized

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        segments: Tensor | None = None,
        cache: list[KVCache] | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """The last vector of each token, (B, T, C).

        ids, mask, types, segments and cache: as in Transformer.forward. memory: (B, S, C), what
        the blocks look at across, where they do. memory_mask: (B, S), False for its padding.
        """
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"a context of {end} tokens: block_size is {self.config.block_size}")
        whole = torch.arange(start, end, device=ids.device)
        where = whole if segments is None else positions_within(segments)[:, start:]
        x, angles = self.tokens(ids), None  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.n_embd)
        if self.config.position == "learned":
            x = x + self.positions(where)
        elif self.config.position == "sinusoidal":
            x = x + self.waves[where]
        else:
            angles = self.cos[where], self.sin[where]
            if segments is not None:
                angles = angles[0][:, None], angles[1][:, None]  # the same for all heads
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.embedding_norm(x))
        may_look = broadcast(mask)
        if segments is not None:
            may_look = (segments[:, start:, None] == segments[:, None, :])[:, None]  # (B, 1, T, S)
        own = cache or [None] * len(self.blocks)  # of a decoder that looks across, two for each
        across = own[len(self.blocks) :] or own
        for block, cached, memory_cached in zip(self.blocks, own, across, strict=False):
            x = block(
                x,
                angles=angles,
                mask=may_look,
                cache=cached,
                memory=memory,
                memory_mask=broadcast(memory_mask),
                memory_cache=memory_cached,
            )
        return self.norm(x)


def broadcast(mask: Tensor | None) -> Tensor | None:
    """(B, S) -> (B, 1, 1, S): the same for all heads and queries."""
    return None if mask is None else mask[:, None, None, :]


def positions_within(segments: Tensor) -> Tensor:
    """The position of each token in its segment: (B, T), of rows as 0 0 0 1 1 2."""
    positions = torch.arange(segments.shape[1], device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values


class Transformer(Tower):
    """Token ids -> logits of tokens or labels, or the mean loss against given targets."""

    def __init__(self, config: ModelConfig):
        reads = config.n_encoder_layer > 0
        super().__init__(config, config.n_layer, causal=config.causal, cross=reads)
        self.transform = self.head_transform()
        n, bias = len(config.labels), True
        if config.head == "tokens":
            n, bias = config.vocab_size, config.bias and config.kind != "a decoder"
        self.head = nn.Linear(config.n_embd, n, bias=bias)
        self.tie()
        self.encoder = Tower(config, config.n_encoder_layer, causal=False) if reads else None
        if reads:
            self.encoder.tokens = self.tokens  # one vocabulary
        init_weights(self)

    def tie(self) -> None:
        """Let the head read tokens by the vectors that stand for them, if it is to."""
        if self.config.head == "tokens" and self.config.tie_embeddings:
            self.head.weight = self.tokens.weight

    def head_transform(self) -> nn.Module:
        """What stands between the last vectors and the head: nothing, but in some encoders."""
        return nn.Identity()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        places: Tensor | None = None,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        segments: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits for each place, (logits, None); or with targets their loss, (None, loss).

        ids: (B, T) integers. places: (B, P), the tokens that get an answer; without them, that is
        each token, P = T; or where a text gets a label, the mean of its tokens, P = 1. targets:
        (B, P); logits: (B, P, V), or so many as there are labels. mask: (B, T) booleans, False
        for tokens that only fill up a row. types: (B, T), the part that a token is of; 0 where
        they are missing. segments: (B, T) integers, for several texts in a row: tokens of one
        number see each other alone, as if their text stood there by itself; with a cache, (B, S),
        of what it holds and then of ids. The loss is the fp32
        mean over the targets that are not -1, and 0 where there is none. With a cache (see
        new_cache) the ids continue those it holds, and it grows by them. Raises ValueError where
        the context would be longer than block_size.
        """
        x = self.hidden(ids, mask=mask, types=types, segments=segments, cache=cache)  # (B, T, C)
        return self.read(self.transform(self.pick(x, places, mask)), targets)

    def pick(self, x: Tensor, places: Tensor | None, mask: Tensor | None) -> Tensor:
        """The vectors that get an answer: of x, (B, T, C), those that forward names, (B, P, C)."""
        if places is not None:
            return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return masked_mean(x, mask) if self.config.head == "text" else x

    def read(self, x: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the head makes of vectors, (B, P, C): logits, or the loss."""
        if targets is None:
            return self.head(x), None
        smoothing = self.config.label_smoothing if self.training else 0.0
        head = self.head
        options = {"bias": head.bias, "smoothing": smoothing}
        return None, projected_cross_entropy(x, head.weight, targets, **options)


class GPT(Transformer):
    """The decoder: from each token, and those before it, to the next one (Radford et al. 2018)."""

    def new_cache(self, length: int | None = None) -> list[KVCache]:
        """An empty cache for forward: one KVCache per layer, with room for block_size tokens.

        length: fewer tokens, for less memory.
        """
        return [KVCache(length or self.config.block_size) for _ in self.blocks]


class Encoder(Transformer):
    """The encoder: from each token and all others to a label, or to what is masked there.

    Devlin et al. 2019 (BERT). With post-norm blocks it has BERT's heads, otherwise EuroBERT's
    (Boizard et al. 2025).
    """

    def head_transform(self) -> nn.Module:
        """A layer before the head that finds tokens, or the label of a text."""
        C, bert = self.config.n_embd, not self.config.norm_first
        if self.config.head == "text":
            return nn.Sequential(nn.Linear(C, C), nn.Tanh() if bert else nn.GELU())
        if self.config.head == "tokens" and bert:
            return nn.Sequential(nn.Linear(C, C), nn.GELU(), NORMS[self.config.norm](self.config))
        return nn.Identity()


class EncoderDecoder(GPT):
    """The first Transformer: from a source to its answer, token by token (Vaswani et al. 2017)."""

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        memory: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of each next token of the answers ids, (B, T); or with targets their loss.

        source: (B, S) ids of the texts that are answered; or memory, what encode has made of them.
        source_mask: (B, S) booleans, False for tokens that only fill up a row. Otherwise as the
        decoder's.
        """
        if memory is None:
            memory = self.encode(source, source_mask)
        x = self.hidden(ids, memory=memory, memory_mask=source_mask, cache=cache)
        return self.read(x, targets)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """What the decoder looks at: (B, S) -> (B, S, C)."""
        return self.encoder.hidden(source, mask=source_mask)

    def new_cache(self, length: int | None = None) -> list[KVCache]:
        """As the decoder's; then one more per layer, for the keys and values of the source."""
        return [*super().new_cache(length), *(KVCache(0) for _ in self.blocks)]


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of x, (B, T, C), over the tokens where mask, (B, T), is True: (B, 1, C)."""
    if mask is None:
        return x.mean(dim=1, keepdim=True)
    kept = mask[..., None].to(x.dtype)
    return (x * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)


@torch.no_grad()
def init_weights(model: Transformer, normal_: Callable = nn.init.normal_) -> None:
    """Draw the weights as GPT-2 does: normal, std 0.02; biases 0; norms 1 (Radford et al. 2019).

    The n layers that write into a residual stream start smaller, by 1 / sqrt(n), so that the sum
    of all of them starts with the variance of one. normal_: what draws a tensor.
    """
    stds = {}
    for tower in (module for module in model.modules() if isinstance(module, Tower)):
        writers = [layer for block in tower.blocks for layer in block.residual_writers()]
        stds |= dict.fromkeys(writers, 0.02 / math.sqrt(len(writers)))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            normal_(module.weight, std=stds.get(module, 0.02))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()


def build_model(config: ModelConfig) -> Transformer:
    """A fresh model of that shape. The weights are drawn from PyTorch's global generator."""
    kinds = {"a decoder": GPT, "an encoder": Encoder, "an encoder-decoder": EncoderDecoder}
    return kinds[config.kind](config)


def flops_per_token(model: Transformer) -> float:
    """Floating point operations of training the model on one token: 6 N + 12 L H Q T.

    Chowdhery et al. 2022 (PaLM), appendix B; N counts the parameters that take part in a matrix
    product, so not a table that is only looked up. Of an encoder and a decoder, a token passes
    one: the mean, where both have as many tokens.
    """
    config, lookups = model.config, []
    if not config.tie_embeddings or config.head != "tokens":
        lookups.append(model.tokens.weight)
    towers = [module for module in model.modules() if isinstance(module, Tower)]
    if config.position == "learned":
        lookups += [tower.positions.weight for tower in towers]
    n = count_parameters(model) - sum(weight.numel() for weight in lookups)
    layers = config.n_layer * len(towers) + config.n_encoder_layer  # of attention
    attention = layers * config.n_head * config.head_size * config.block_size
    return (6 * n + 12 * attention) / len(towers)


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes; a shared tensor counts once."""
    return sum(p.numel() for p in model.parameters())
