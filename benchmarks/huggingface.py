"""The largest difference between our logits and those of transformers, for each family.

    python -m benchmarks.huggingface

Random small models in float32: some are made by transformers and read here, the others are made
here and read by transformers. A difference counts in units of the largest logit, if that is above
1. An encoder gets padded rows, and pairs of texts where it knows of them. Every tenth model is
shown a long context, too: rotary angles grow with the position, and so does what is wrong there.
"""

import contextlib
import io
import random
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from benchmarks.compare import at_least_1, new_file, run_benchmark, write
from nanolm.hub.families import FAMILIES, OURS, config_json
from nanolm.hub.models import export_model
from nanolm.hub.tokenizers import write_tokenizer
from nanolm.layers import ModelConfig
from nanolm.model import Transformer, build_model
from nanolm.runs.load import load_model
from nanolm.text.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer(map(chr, range(97)))
SHORT, LONG = (2, 64), (1, 8192)  # (B, T)


def draw_config(name: str, head: str) -> ModelConfig:
    """A small model that the family of that name can have."""
    family = FAMILIES[name]
    labels = tuple("abc") if head != "tokens" else ()
    n_kv_head = random.choice([1, 2, 3])
    n_head = n_kv_head * random.choice([1, 2]) if "n_kv_head" in family.keys else n_kv_head
    sizes = {"head_size": random.choice([16, 32]), "n_kv_head": n_kv_head}
    if "head_size" not in family.keys:
        sizes = {}
    free = {
        "tie_embeddings": random.choice([False, True]),
        "norm_eps": random.choice([1e-6, 1e-5, 1e-2]),
        "bias": name != "qwen3" and random.choice([False, True]),
    }
    if "n_encoder_layer" in family.keys:
        free |= {"n_encoder_layer": random.choice([1, 2]), "start_id": 0, "bias": True}
        free |= {"scale_embeddings": random.choice([False, True])}
        free |= {"mlp": random.choice(list(family.activations.values()))}
    return ModelConfig(
        **(free | family.shape | sizes | {"head": head, "labels": labels}),
        vocab_size=TOKENIZER.vocab_size,
        block_size=LONG[1],
        n_layer=random.choice([1, 2, 4]),
        n_head=n_head,
        n_embd=n_head * random.choice([16, 48]),
        n_hidden=random.choice([64, 200]),
        rope_theta=random.choice([1e4, 1e6]),
    )


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    """Move every weight, so that biases are not 0, and norms not 1."""
    for weight in model.parameters():
        if weight.requires_grad:  # not so tables of sinusoids
            weight += 0.1 * torch.randn_like(weight)


def read(config: ModelConfig, name: str, folder: Path) -> tuple[Transformer, torch.nn.Module]:
    """A model of transformers, read here and as it is."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    theirs = config_json(FAMILIES[name], config) | ends
    del theirs[OURS]
    kind = getattr(transformers, FAMILIES[name].heads[config.head].architecture)
    model = kind(transformers.AutoConfig.for_model(name, **theirs)).eval()
    scramble(model)
    model.save_pretrained(folder)
    write_tokenizer(TOKENIZER, folder, config)
    return load_model(folder)[0], model


def written(config: ModelConfig, name: str, folder: Path) -> tuple[Transformer, torch.nn.Module]:
    """A model of ours, as it is and read by transformers."""
    model = build_model(config).eval()
    scramble(model)
    kind = getattr(transformers, export_model(model, TOKENIZER, folder))
    return model, kind.from_pretrained(folder)


@torch.no_grad()
def difference(model: Transformer, theirs: torch.nn.Module, shape: tuple[int, int]) -> float:
    """max |a - b| / max(1, max |b|) of the logits, a being ours, of random tokens (B, T)."""
    (B, T), config = shape, model.config
    ids = torch.randint(TOKENIZER.vocab_size, shape)
    if config.n_encoder_layer:
        source = torch.randint(TOKENIZER.vocab_size, shape)
        mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
        their_inputs = {"attention_mask": mask.long(), "decoder_input_ids": ids}
        ours = model(ids, source=source, source_mask=mask)[0]
        wanted = theirs(source, **their_inputs).logits
    elif config.causal:
        ours, wanted = model(ids)[0], theirs(ids).logits
    else:
        lengths = torch.randint(1, T + 1, (B, 1))
        mask = torch.arange(T) < lengths
        their_inputs, our_inputs = {"attention_mask": mask.long()}, {"mask": mask}
        if config.n_types:
            our_inputs["types"] = (torch.arange(T) >= lengths // 2).long()
            their_inputs["token_type_ids"] = our_inputs["types"]
            if config.head == "text":
                our_inputs["places"] = torch.zeros(B, 1, dtype=torch.long)
        ours, wanted = model(ids, **our_inputs)[0], theirs(ids, **their_inputs).logits
        real = mask if config.head != "text" else torch.ones(B, dtype=torch.bool)
        ours, wanted = ours.view(wanted.shape)[real], wanted[real]
    return ((ours - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=at_least_1, default=50, help="in each direction")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    parser.add_argument("--json", type=new_file, help="also write the results to this file")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    random.seed(0)
    torch.manual_seed(0)
    results = {}
    kinds = [(name, head) for name in options.families for head in FAMILIES[name].heads]
    for name, head in kinds:
        for way in (read, written):
            found = {SHORT: [], LONG: []}
            for i in range(options.models):
                quiet = contextlib.redirect_stderr(io.StringIO())  # progress bars
                with TemporaryDirectory() as folder, quiet:
                    models = way(draw_config(name, head), name, Path(folder))
                for shape in found if i % 10 == 0 else (SHORT,):
                    found[shape].append(difference(*models, shape))
            for (_, length), differences in found.items():
                largest = max(differences)
                results[f"{name}, {head}, {way.__name__}, {length} tokens"] = largest
                title = f"{name:8} {head:6} {way.__name__:8} {length:5} tokens"
                print(f"{title} {largest:.1e} in {len(differences)} models", flush=True)
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
