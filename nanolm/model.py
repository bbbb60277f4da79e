"""The models: token ids become vectors, N blocks add to them, and a head reads them.

A decoder (GPT) looks back alone, and guesses each next token. An encoder looks both ways: it
guesses tokens that are hidden from it, and finds labels for a text or for its words. They are one
class, and one block.

The models know nothing of optimizers, files, devices or processes.
"""

import math

import torch
from torch import Tensor, nn

from nanolm.attention import KVCache, rotary_angles
from nanolm.layers import NORMS, Block, ModelConfig, sinusoids
from nanolm.loss import projected_cross_entropy


class Transformer(nn.Module):
    """Token ids -> logits of tokens or labels, or the mean loss against given targets."""

    def __init__(self, config: ModelConfig):
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
        self.embedding_norm = nn.Identity() if first else norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config) if first else nn.Identity()  # the last block has normalized
        self.transform = self.head_transform()
        n, bias = len(config.labels), True
        if config.head == "tokens":
            n, bias = config.vocab_size, config.bias and not config.causal
        self.head = nn.Linear(C, n, bias=bias)
        if config.head == "tokens" and config.tie_embeddings:
            self.head.weight = self.tokens.weight
        init_weights(self)

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
        cache: list[KVCache] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits for each place, (logits, None); or with targets their loss, (None, loss).

        ids: (B, T) integers. places: (B, P), the tokens that get an answer; without them, that is
        each token, P = T; or where a text gets a label, the mean of its tokens, P = 1. targets:
        (B, P); logits: (B, P, V), or so many as there are labels. mask: (B, T) booleans, False
        for tokens that only fill up a row. types: (B, T), the part that a token is of; 0 where
        they are missing. The loss is the fp32 mean over the targets that are not -1, and 0 where
        there is none. With a cache (see new_cache) the ids continue those it holds, and it grows
        by them. Raises ValueError where the context would be longer than block_size.
        """
        x = self.hidden(ids, mask=mask, types=types, cache=cache)  # (B, T, C)
        if places is not None:
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))  # (B, P, C)
        elif self.config.head == "text":
            x = masked_mean(x, mask)
        x = self.transform(x)
        if targets is None:
            return self.head(x), None
        return None, projected_cross_entropy(x, self.head.weight, targets, bias=self.head.bias)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The last vector of each token, (B, T, C); arguments as in forward."""
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"a context of {end} tokens: block_size is {self.config.block_size}")
        x, angles = self.tokens(ids), None  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.positions.weight[start:end]
        elif self.config.position == "sinusoidal":
            x = x + self.waves[start:end]
        else:
            angles = self.cos[start:end], self.sin[start:end]
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.embedding_norm(x))
        may_look = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, cache[i] if cache else None, may_look)
        return self.norm(x)


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


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of x, (B, T, C), over the tokens where mask, (B, T), is True: (B, 1, C)."""
    if mask is None:
        return x.mean(dim=1, keepdim=True)
    kept = mask[..., None].to(x.dtype)
    return (x * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)


@torch.no_grad()
def init_weights(model: Transformer) -> None:
    """Draw the weights as GPT-2 does: normal, std 0.02; biases 0; norms 1 (Radford et al. 2019).

    The n layers that write into the residual stream start smaller, by 1 / sqrt(n), so that the sum
    of all of them starts with the variance of one.
    """
    writers = {layer for block in model.blocks for layer in block.residual_writers()}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02 / math.sqrt(len(writers)) if module in writers else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: ModelConfig) -> Transformer:
    """A fresh model of that shape. The weights are drawn from PyTorch's global generator."""
    return (GPT if config.causal else Encoder)(config)


def flops_per_token(model: Transformer) -> float:
    """Floating point operations of training the model on one token: 6 N + 12 L H Q T.

    Chowdhery et al. 2022 (PaLM), appendix B; N counts the parameters that take part in a matrix
    product, so not a table that is only looked up.
    """
    config, lookups = model.config, []
    if not config.tie_embeddings or config.head != "tokens":
        lookups.append(model.tokens.weight)
    if config.position == "learned":
        lookups.append(model.positions.weight)
    n = count_parameters(model) - sum(weight.numel() for weight in lookups)
    attention = config.n_layer * config.n_head * config.head_size * config.block_size
    return 6 * n + 12 * attention


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes; a shared tensor counts once."""
    return sum(p.numel() for p in model.parameters())
