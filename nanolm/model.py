"""The model: a decoder-only Transformer that turns token ids into a guess at each next token.

Ids become vectors; N blocks add to them; the last vector of each position is compared with every
token's embedding.

The model knows nothing of optimizers, files, devices or processes.
"""

import math

import torch
from torch import Tensor, nn

from nanolm.attention import KVCache, rotary_angles
from nanolm.layers import NORMS, Block, ModelConfig, sinusoids
from nanolm.loss import projected_cross_entropy


class GPT(nn.Module):
    """Token ids -> logits of each next token, or the mean loss against given targets."""

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
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight
        init_weights(self)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, cache: list[KVCache] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of each next token, (logits, None); or with targets their loss, (None, loss).

        ids, targets: (B, T) integers; logits: (B, T, V). The loss is the fp32 mean over the
        targets that are not -1, and 0 where there is none. With a cache (see new_cache) the ids
        continue those it holds, and it grows by them. Raises ValueError where the context would
        be longer than block_size.
        """
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
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, cache[i] if cache else None)
        x = self.norm(x)
        if targets is None:
            return self.head(x), None  # (B, T, V)
        return None, projected_cross_entropy(x, self.head.weight, targets)

    def new_cache(self, length: int | None = None) -> list[KVCache]:
        """An empty cache for forward: one KVCache per layer, with room for block_size tokens.

        length: fewer tokens, for less memory.
        """
        return [KVCache(length or self.config.block_size) for _ in self.blocks]


@torch.no_grad()
def init_weights(model: GPT) -> None:
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


def build_model(config: ModelConfig) -> GPT:
    """A fresh model of that shape. The weights are drawn from PyTorch's global generator."""
    return GPT(config)


def flops_per_token(model: GPT) -> float:
    """Floating point operations of training the model on one token: 6 N + 12 L H Q T.

    Chowdhery et al. 2022 (PaLM), appendix B; N counts the parameters that take part in a matrix
    product, so not a table that is only looked up.
    """
    config, lookups = model.config, []
    if not config.tie_embeddings:
        lookups.append(model.tokens.weight)
    if config.position == "learned":
        lookups.append(model.positions.weight)
    n = count_parameters(model) - sum(weight.numel() for weight in lookups)
    attention = config.n_layer * config.n_head * config.head_size * config.block_size
    return 6 * n + 12 * attention


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes; a shared tensor counts once."""
    return sum(p.numel() for p in model.parameters())
