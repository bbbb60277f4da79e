"""Models in and out of Hugging Face's formats.

A pretrained model is a folder: config.json has its shape, model.safetensors its weights by name
(or several model-*.safetensors have them), and tokenizer.json its tokenizer. The names are those
of a family (see families.py).

An export works without any code of ours wherever they do. A bias that a family has and a model
has not is written as zeros, and a bias of zeros that the family has not is left out; whatever else
one side has and the other has not is refused by name.

Only safetensors are read: a pickle, as in a .bin file, can run code.
"""

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanolm.hub.families import (
    FAMILIES,
    Family,
    config_json,
    entries,
    family_of,
    read_config,
    shapes_of,
    tied,
)
from nanolm.hub.names import read_json
from nanolm.hub.tokenizers import read_tokenizer, write_tokenizer
from nanolm.layers import ModelConfig, sinusoids
from nanolm.model import Transformer, build_model
from nanolm.system.files import SCRATCH, whole_folder, write_text
from nanolm.tasks.answering import stop_ids
from nanolm.text.conversations import can_chat
from nanolm.text.tokenizer import Tokenizer, mask_of

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
# Where else a file may hold the embedding, and where the sinusoids, which we compute.
TWICE = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
WAVES = {"encoder.embed_positions.weight", "decoder.embed_positions.weight"}
PARTS = "model-*.safetensors"  # the names of large models' files
# What some files hold beside the weights: buffers, and further heads from BERT's training.
PASSED_OVER = re.compile(
    r"\bh\.\d+\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\bembeddings\.position_ids$|"
    r"\bpooler\.dense\.|^cls\.seq_relationship\.|^cls\.predictions\.decoder\."
)
NEWER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
OLDER = re.compile("|".join(map(re.escape, NEWER)))


# ------------------------------------------------------------------------------------------
# In


def load_pretrained(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The model in a folder of Hugging Face's format, in float32, and its tokenizer.

    Tokens that the tokenizer does not have, with which some models are padded, are left out.
    Raises ValueError where something is missing, damaged, or not within ModelConfig.
    """
    hf_config, family, config = read_shape(folder / CONFIG)
    tokenizer = read_tokenizer(folder)
    with ExitStack() as stack:
        try:
            files = open_weights(folder, family, stack)
            config, weights = read_weights(files, family, config, hf_config)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot use the weights in {folder}: {error}") from None
    n, tables = tokenizer.vocab_size, ("tokens.weight", "encoder.tokens.weight")
    if config.vocab_size < n:
        raise ValueError(
            f"{folder}: its tokenizer has {n} tokens, and its model only {config.vocab_size}"
        )
    if config.vocab_size > n:
        left = f"{config.vocab_size - n} of {config.vocab_size}"
        print(f"{folder}: left out {left} rows, which no token has", file=sys.stderr)
    for name in (*tables, "head.weight", "head.bias") if config.head == "tokens" else tables:
        if name in weights:
            weights[name] = weights[name][:n]
    model = build_model(replace(config, vocab_size=n))
    model.load_state_dict(weights)
    return model.eval(), tokenizer


def read_shape(path: Path) -> tuple[dict, Family, ModelConfig]:
    """What a config.json holds, and the family and shape that it tells of."""
    try:
        hf_config = read_json(path)
        return hf_config, *read_config(hf_config)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is missing or damaged"
        raise ValueError(f"cannot use {path}: {reason}") from None


def open_weights(folder: Path, family: Family, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """For each tensor, by its name without the prefix: the open file, and its name there."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("they need the package safetensors: pip install safetensors") from None
    found = []
    for path in sorted(folder.glob(WEIGHTS)) or sorted(folder.glob(PARTS)):
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged ({error})") from None
        for name in sorted(file.keys()):
            newer = OLDER.sub(lambda match: NEWER[match[0]], name)
            found.append((newer.removeprefix(family.prefix), (file, name)))
    if not found:
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        pickles = f", but {others}: a pickle can run code, and is not read" if others else ""
        raise ValueError(f"there is no {WEIGHTS!r}{pickles}")
    if len(dict(found)) < len(found):
        raise ValueError(f"some stand there twice, maybe with {family.prefix} and without")
    return dict(found)


def read_weights(
    files: dict[str, tuple[Any, str]], family: Family, config: ModelConfig, hf_config: dict
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The weights by our names, and the config, which now says whether there are biases.

    files: see open_weights. hf_config: config.json.
    """
    if config.n_layer > len(files):
        raise ValueError(f"{len(files)} tensors cannot be {config.n_layer} layers")
    weights = {}
    for name, ours, transposed, row in entries(family, config, hf_config):
        if (plain := name.removeprefix(family.prefix)) not in files:
            raise ValueError(f"there is no {plain}")
        lengths = [shape[0] for shape in ours.values()]
        shape = [*([1] if row else []), sum(lengths), *next(iter(ours.values()))[1:]]
        tensor = read_tensor(*files.pop(plain), shape[::-1] if transposed else shape)
        tensor = tensor[0] if row else tensor
        rows = (tensor.T if transposed else tensor).split(lengths)
        weights.update(zip(ours, rows, strict=True))
    if names := tied(config):
        weights |= dict.fromkeys(names, weights["tokens.weight"])
        for twice in files.keys() & TWICE:  # some files hold it again
            tensor = read_tensor(*files[twice], list(weights["tokens.weight"].shape))
            if not torch.equal(tensor, weights["tokens.weight"]):
                raise ValueError(
                    f"{files[twice][1]} is not the embedding, to which {CONFIG} ties it"
                )
            del files[twice]
    for table in files.keys() & WAVES if config.position == "sinusoidal" else ():
        waves = sinusoids(config.block_size, config.n_embd)
        if not torch.allclose(read_tensor(*files[table], list(waves.shape)), waves, atol=0.01):
            raise ValueError(f"{files[table][1]} holds other numbers than sinusoids")
        del files[table]
    if left := [name for _, name in files.values() if not PASSED_OVER.search(name)]:
        architecture = family.heads[config.head].architecture
        raise ValueError(f"there is a {left[0]}, and {architecture} has none")
    return settle_biases(config, weights)


def settle_biases(
    config: ModelConfig, weights: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """All biases where the file has any, with zeros for those that the family lacks; or none.

    A model that was exported without biases gets none back, unless someone has trained them since.
    Those that every such model has are not meant.
    """
    shapes, fewest = shapes_of(config), shapes_of(config, bias=False)
    biases = [name for name in shapes if name.endswith(".bias") and name not in fewest]
    given = [weights[name] for name in biases if name in weights]
    wanted = bool(given) and (config.bias or any(bool(bias.any()) for bias in given))
    for name in biases:
        if wanted:
            weights.setdefault(name, torch.zeros(shapes[name]))
        else:
            weights.pop(name, None)
    return replace(config, bias=wanted), weights


def read_tensor(file: Any, name: str, shape: list[int]) -> Tensor:
    """A tensor of an open file, in float32. Raises ValueError where it is not as it should be."""
    found = file.get_slice(name).get_shape()  # from the header: the tensor may be too large
    if found != shape:
        raise ValueError(f"{name} has the shape {found} and not {shape}")
    tensor = file.get_tensor(name).float()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return tensor


# ------------------------------------------------------------------------------------------
# Out


def export_model(model: Transformer, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write a model and its tokenizer in Hugging Face's format; returns the architecture.

    Raises ValueError, with nothing written, for a model that no family can be, and for a folder
    that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(path.name != SCRATCH for path in folder.iterdir()):
        raise ValueError(f"{folder} is there already, and not empty: choose a new folder")
    name = family_of(model.config)
    family = FAMILIES[name]
    end, begin = tokenizer.end_of_text, tokenizer.begin_of_text
    ends = {"bos_token_id": end if begin is None else begin, "eos_token_id": end}
    config = {"model_type": name, **config_json(family, model.config), **ends}
    generation = {**ends, "pad_token_id": end}  # in config.json, it would get no gradient there
    if model.config.kind == "a decoder":
        generation["do_sample"] = True  # or servers heed neither a temperature nor a seed
    if model.config.n_encoder_layer:
        config["pad_token_id"] = None
        generation["decoder_start_token_id"] = model.config.start_id
    if can_chat(tokenizer):
        generation["eos_token_id"] = stop_ids(tokenizer)
    if not model.config.causal:
        config["pad_token_id"] = None
        config["mask_token_id"] = mask_of(tokenizer) or end or 0  # it has to be some token
    tensors = hf_weights(family, model, config)
    with whole_folder(folder, seal=CONFIG) as scratch:
        write_weights(tensors, scratch / WEIGHTS)
        write_tokenizer(tokenizer, scratch, model.config)
        if model.config.causal:
            write_text(scratch / GENERATION, json.dumps(generation, indent=2) + "\n")
        write_text(scratch / CONFIG, json.dumps(config, indent=2) + "\n")
        (scratch / WEIGHTS).chmod((scratch / CONFIG).stat().st_mode)  # it was made private
    return family.heads[model.config.head].architecture


def hf_weights(family: Family, model: Transformer, hf_config: dict) -> dict[str, Tensor]:
    """The tensors of model.safetensors. Raises ValueError for what the family has no place for."""
    left, tensors = model.state_dict(), {}
    for name, ours, transposed, row in entries(family, model.config, hf_config):
        stacked = torch.cat([left.pop(part, torch.zeros(shape)) for part, shape in ours.items()])
        stacked = stacked[None] if row else stacked
        tensors[name] = (stacked.T if transposed else stacked).contiguous()
    for name in tied(model.config):
        del left[name]
    if model.config.position == "sinusoidal":  # not trained, and yet they look for them
        waves = sinusoids(model.config.block_size, model.config.n_embd)
        tensors |= {family.prefix + name: waves.clone() for name in WAVES}
    if lost := [name for name, tensor in left.items() if tensor.any()]:
        architecture = family.heads[model.config.head].architecture
        raise ValueError(f"{lost[0]} is not 0: {architecture} has no place for it")
    return tensors


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of safetensors. Raises ValueError where that fails, as on a full disk."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs the package safetensors: pip install safetensors") from None
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise ValueError(
            f"cannot write {path.name} ({error}); it needs {needed:,} bytes"
        ) from None
