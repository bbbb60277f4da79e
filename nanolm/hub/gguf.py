"""Decoders in GGUF, the one file that llama.cpp, and what is built on it, runs.

It holds keys, a vocabulary and the weights (the format: docs/gguf.md of ggml). What transformers
would get (see models.py) is written here once more, under other names, which the package gguf
knows. Three things differ:

- A rotation turns pairs of channels: here and in transformers a channel of the first half of a
  head with that of the second, in llama.cpp's llama and arcee two neighbours. So their rows
  change places.
- A vocabulary is byte-level BPE, and how a text is cut before is not written down: the file names
  one of the patterns that llama.cpp knows.
- Matrices may be rounded: to 16 bits, or to 8 with a scale for each 32 numbers of a row.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from nanolm.bpe import GPT2_SPLIT, with_fallback
from nanolm.hub.families import FAMILIES, config_json, family_of
from nanolm.hub.models import hf_weights
from nanolm.hub.tokenizers import pipeline_of
from nanolm.layers import ModelConfig, require_choice
from nanolm.model import Transformer
from nanolm.system.files import made_folder, whole_file
from nanolm.text.conversations import CHAT_TEMPLATE, ENDS, can_chat
from nanolm.text.pretrained import BYTES
from nanolm.text.tokenizer import Tokenizer

SUFFIX = ".gguf"
DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # gguf's names of files
GROUP = 32  # numbers of a row that share a scale in q8_0

# Our keys, and what follows add_ in the name of the method of gguf that writes them.
KEYS = """
    vocab_size    vocab_size
    block_size    context_length
    n_layer       block_count
    n_embd        embedding_length
    n_hidden      feed_forward_length
    n_head        head_count
    n_kv_head     head_count_kv
    head_size     key_length
    head_size     value_length
"""
LAYER_NORM = "norm_eps layer_norm_eps"
RMS_AND_ROTARY = """
    norm_eps      layer_norm_rms_eps
    head_size     rope_dimension_count
    rope_theta    rope_freq_base
"""

TURNS_NEIGHBOURS = ("llama", "arcee")
# Modules whose bias has no place there, and has one in transformers.
WITHOUT_BIAS = {"arcee": ("attn_output", "ffn_up", "ffn_down"), "qwen3": ("attn_output",)}

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
# The patterns that cut a text one after the other, whether what is a token is never cut further,
# and llama.cpp's name for it.
CUTS = {
    ((GPT2_SPLIT,), False): "gpt-2",
    ((DIGIT, GPT2_SPLIT), False): "smollm",
    ((ENGLISH + DIGIT + BLANKS,), False): "qwen2",
    ((ENGLISH + DIGIT + "{1,3}" + BLANKS,), False): "dbrx",
    ((ENGLISH + DIGIT + "{1,3}" + BLANKS,), True): "llama-bpe",
}


def package() -> ModuleType:
    """The package gguf. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("a .gguf file needs the package gguf: pip install gguf") from None
    return gguf


def export_gguf(
    model: Transformer, tokenizer: Tokenizer, path: str | Path, *, dtype: str = "f32"
) -> str:
    """Write a decoder and its tokenizer as a GGUF file; returns llama.cpp's name for its kind.

    dtype: of the matrices, one of DTYPES; vectors stay in float32. Raises ValueError, with nothing
    written, for what llama.cpp cannot run, and for a file that is there already.
    """
    path, config = Path(path), model.config
    require_choice("dtype", dtype, DTYPES)
    if path.exists():
        raise ValueError(f"{path} is there already: choose a new file")
    if config.kind != "a decoder":
        raise ValueError(
            f"the model is {config.kind}, and a {SUFFIX} file is of a decoder: name a folder"
        )
    name, gguf = family_of(config), package()
    writer = gguf.GGUFWriter(None, name)
    add_shape(writer, config)
    add_vocabulary(writer, tokenizer)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for own, tensor in gguf_weights(name, model):
        array, kind = rounded(tensor, dtype)
        writer.add_tensor(own, array, raw_dtype=kind)
    try:
        with made_folder(path.parent), whole_file(path) as file, closing(writer):
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    return name


def add_shape(writer: Any, config: ModelConfig) -> None:
    """Add the keys that say what shape the model has."""
    own = RMS_AND_ROTARY if config.position == "rotary" else LAYER_NORM
    words = (KEYS + own).split()
    for key, method in zip(words[::2], words[1::2], strict=True):
        getattr(writer, f"add_{method}")(getattr(config, key))


# ------------------------------------------------------------------------------------------
# Weights


def gguf_weights(name: str, model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names there. Raises ValueError for what has no place there."""
    gguf, config, family = package(), model.config, FAMILIES[name]
    family = replace(family, weights=family.weights.replace("transposed", ""))  # only GPT-2's own
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.n_layer)
    for theirs, tensor in hf_weights(family, model, config_json(family, config)).items():
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        module, kind = own.split(".")[-2:]
        if kind == "bias" and module in WITHOUT_BIAS.get(name, ()):
            if tensor.any():
                raise ValueError(
                    f"{theirs} is not 0: llama.cpp's {name} has no place for it; name a folder"
                )
            continue
        if module in ("attn_q", "attn_k") and name in TURNS_NEIGHBOURS:
            tensor = pairs_as_neighbours(tensor, config.head_size)
        yield own, tensor


def pairs_as_neighbours(rows: Tensor, head_size: int) -> Tensor:
    """In each head, the rows 0 1 2 | 3 4 5 as 0 3 1 4 2 5: (heads * hs, ...), also of a bias."""
    halves = rows.unflatten(0, (-1, 2, head_size // 2))  # (heads, 2, hs / 2, ...)
    return halves.transpose(1, 2).reshape(rows.shape)


def rounded(tensor: Tensor, dtype: str) -> tuple[np.ndarray, int]:
    """A tensor as it is stored, and gguf's number for that.

    Rows of no whole groups are stored in 16 bits; vectors, and what these cannot hold, in 32.
    """
    gguf, array = package(), tensor.numpy()
    if array.ndim == 1 or np.abs(array).max() > np.finfo(np.float16).max:
        dtype = "f32"
    elif dtype == "q8_0" and array.shape[1] % GROUP:
        dtype = "f16"
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    return gguf.quants.quantize(array, kind), kind


# ------------------------------------------------------------------------------------------
# The vocabulary


def add_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """Add the tokens, how a text becomes them, and what begins and ends a text or an answer."""
    content, end, begin = parts_of(tokenizer), tokenizer.end_of_text, tokenizer.begin_of_text
    if end is None:  # llama.cpp would take token 11
        raise ValueError(
            f"no token of the tokenizer ends a text, and a {SUFFIX} file needs one: name a folder"
        )
    types = package().TokenType
    tokens = {i: (f"[PAD{i}]", types.UNUSED) for i in range(tokenizer.vocab_size)}
    tokens |= {i: (text, types.NORMAL) for text, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        kind = types.CONTROL if token["special"] else types.USER_DEFINED
        tokens[token["id"]] = token["content"], kind
    texts, kinds = zip(*tokens.values(), strict=True)
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # which means byte-level BPE
    writer.add_tokenizer_pre(cut_of(content))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or ["   "])  # there has to be one; it is of blanks: of no token
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(begin is not None)
    if can_chat(tokenizer):
        writer.add_eot_token_id(tokenizer.special_tokens[ENDS])
        writer.add_chat_template(re.sub("{% (end)?generation %}", "", CHAT_TEMPLATE))


def parts_of(tokenizer: Tokenizer) -> dict:
    """The tokenizer.json of a tokenizer that llama.cpp can be, too. Raises ValueError if none."""
    content = json.loads(pipeline_of(tokenizer).to_str())
    form = (content["normalizer"] or {}).get("type")
    if cut_of(content) is None or form not in (None, "NFC"):
        raise ValueError(
            f"tokenizer {tokenizer.name}: a {SUFFIX} file has byte-level BPE, cut by a pattern of "
            f"llama.cpp's ({', '.join(CUTS.values())}): prepare the text with --tokenizer=bpe:N, "
            "or name a folder"
        )
    if form:
        print(
            "warning: llama.cpp does not bring texts to NFC, as the tokenizer does",
            file=sys.stderr,
        )
    return content


def cut_of(content: dict) -> str | None:
    """What llama.cpp calls the way in which a tokenizer.json cuts a text, if it can do it."""
    model, cut = content["model"], content["pre_tokenizer"] or {}
    if model["type"] != "BPE" or not BYTES.keys() <= model["vocab"].keys():
        return None
    patterns = map(pattern_of, cut.get("pretokenizers", [cut]))
    return CUTS.get((tuple(filter(None, patterns)), bool(model.get("ignore_merges"))))


def pattern_of(step: dict) -> str:
    """The pattern by which a step of a pre-tokenizer cuts; "" where it only spells bytes."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2_SPLIT if step["use_regex"] else ""
    if kind == "Digits" and step["individual_digits"]:
        return DIGIT
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        before, after = with_fallback("\0").split("\0")  # as an export writes it
        return step["pattern"].get("Regex", "?").removeprefix(before).removesuffix(after)
    return "?"
