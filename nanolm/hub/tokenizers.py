"""Tokenizers in Hugging Face's files, in and out.

tokenizer.json is a pipeline: a normalizer rewrites the text, a pre-tokenizer cuts it into pieces,
a model turns pieces into tokens, a decoder turns tokens back into text; added tokens are found in
the text before all that. Our two tokenizers are two such pipelines, and these are all that is
read:

                     normalizer     pre-tokenizer                   model       decoder
    characters       none           each character a piece          WordLevel   Fuse
    byte-level BPE   none, or NFC   a pattern, bytes as characters  BPE         ByteLevel

The same BPE can be written in two older files: vocab.json has the ids, and merges.txt the merges,
with GPT-2's pattern. In all of them a byte is spelled as a character (see gpt2.py).

A merge list and the ranks of the tokens are two ways to say the same, as long as the merges come
in the order of their tokens, and each is the one that its token's bytes lead to. (Others may be
in between: some files list every way to cut a token.)
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import regex

from nanolm.bpe import ANY_CHARACTER, GPT2_SPLIT, compiled, merges_of, with_fallback
from nanolm.hub.names import find_folder, read_json, require
from nanolm.system.files import write_text
from nanolm.text.bpe_tokenizer import END_OF_TEXT
from nanolm.text.char_tokenizer import check_characters
from nanolm.text.gpt2 import FILE as GPT2_FILE
from nanolm.text.gpt2 import byte_of_character
from nanolm.text.tokenizer import (
    TOKENIZER_FILE,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

PIPELINE, SETTINGS, VOCAB, MERGES, ROLES, ADDED = FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# GPT-2's pattern once each digit has been cut out: to the blanks before it, the text ends there.
SINGLE_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # of tokenizer_config.json


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: a file, a dataset, a run, a pretrained model, or one of the hub.

    Raises ValueError where there is none, or none that a tokenizer here can be.
    """
    path = Path(name)
    if path.exists() and not (path.is_dir() and is_pretrained(path)):
        return load_tokenizer(path)
    return read_tokenizer(find_folder(name, FILES))


def is_pretrained(folder: Path) -> bool:
    """Whether a folder has Hugging Face's files of a tokenizer, and none of ours."""
    ours = (folder / name for name in (TOKENIZER_FILE, GPT2_FILE))
    return not any(path.exists() for path in ours) and any(
        (folder / name).exists() for name in (PIPELINE, VOCAB)
    )


# ------------------------------------------------------------------------------------------
# Reading


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a pretrained model's folder. Raises ValueError, saying what is wrong."""
    path = next((folder / name for name in (PIPELINE, VOCAB) if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder} has no tokenizer: neither {PIPELINE} nor {VOCAB}")
    try:
        settings = read_settings(folder)
        content = read_json(path)
        if path.name == VOCAB:
            content = pipeline_of(content, folder / MERGES, settings)
        tokenizer = tokenizer_of(content, settings)
        check_settings(tokenizer, settings)
        return tokenizer
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, (OSError, ValueError)) else "it is damaged"
        raise ValueError(f"cannot use the tokenizer {path}: {reason}") from None


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, and what older files say beside it."""
    found = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in (SETTINGS, ROLES, ADDED)
    }
    settings = found[ROLES] | {key: v for key, v in found[SETTINGS].items() if v is not None}
    added = settings.get("added_tokens_decoder", {})
    named = {str(i): {"content": token} for token, i in found[ADDED].items()}
    return settings | {"added_tokens_decoder": named | added}


def check_settings(tokenizer: Tokenizer, settings: dict) -> None:
    """Raise ValueError where the settings speak of other tokens than the tokenizer has."""
    if settings.get("tokenizer_class") in GPT2_CLASSES:
        require(SETTINGS, settings, add_prefix_space=(None, False))
    for i, token in settings["added_tokens_decoder"].items():
        if tokenizer.special_tokens.get(token["content"]) != int(i):
            raise ValueError(f"{SETTINGS} has another token, {token['content']!r} with the id {i}")
    if settings.get("eos_token") and tokenizer.end_of_text is None:
        raise ValueError(f"its eos_token {end_of(settings)!r} is none of its tokens")


def pipeline_of(vocab: dict, merges: Path, settings: dict) -> dict:
    """What tokenizer.json would hold in the place of GPT-2's vocab.json and merges.txt."""
    require(SETTINGS, settings, tokenizer_class=GPT2_CLASSES)
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    named = settings["added_tokens_decoder"].items()
    added = {token: i for token, i in vocab.items() if token in (END_OF_TEXT, end_of(settings))}
    added |= {token["content"]: int(i) for i, token in named}
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    return pipeline(model, steps=[byte_level()], added=added)


def tokenizer_of(content: dict, settings: dict) -> Tokenizer:
    """The tokenizer of a pipeline and of tokenizer_config.json."""
    model = {"type": "BPE", **content["model"]}  # the oldest files leave it out, as GPT-2's do
    if model["type"] == "WordLevel":
        return characters_of(content)
    require("model", model, type=("BPE",), byte_fallback=(False, None), dropout=(None, 0))
    require("model", model, continuing_subword_prefix=("", None), end_of_word_suffix=("", None))
    added = {}
    for token in content["added_tokens"]:
        require(f"added token {token['content']!r}", token, single_word=(False,))
        require(f"added token {token['content']!r}", token, lstrip=(False,), rstrip=(False,))
        if token.get("normalized") and content["normalizer"] and not token["content"].isascii():
            raise ValueError(f"its added token {token['content']!r} would have to be normalized")
        added[token["content"]] = token["id"]
    byte = byte_of_character()
    words = {token: i for token, i in model["vocab"].items() if token not in added}
    if not set(byte).issuperset("".join(words)):
        raise ValueError("its tokens are not made of bytes: nanolm reads byte-level BPE")
    ranks = {spelled(token, byte): i for token, i in words.items()}
    check_merges(model["merges"], ranks, byte)
    return BPETokenizer(
        ranks,
        added,
        pattern=pattern_of(steps_of(content["pre_tokenizer"])),
        end_token=end_of(settings),
        normal_form=normal_form_of(content["normalizer"]),
    )


def end_of(settings: dict) -> str:
    """The name of the token that ends a document, by tokenizer_config.json."""
    end = settings.get("eos_token") or END_OF_TEXT
    return end["content"] if isinstance(end, dict) else end


def characters_of(content: dict) -> CharTokenizer:
    """The tokenizer of a pipeline for characters. Raises ValueError for any other of words."""
    model = content["model"]
    vocab = model["vocab"]
    check_characters("".join(vocab))
    tokenizer = CharTokenizer("".join(vocab))
    more = content["normalizer"] or content["added_tokens"] or model["unk_token"] in vocab
    cut = steps_of(content["pre_tokenizer"])
    if vocab != tokenizer.ids or more or cut != [split_by(ANY_CHARACTER)]:
        raise ValueError("it is neither a byte-level BPE nor characters as nanolm writes them")
    return tokenizer


def spelled(token: str, byte: Mapping[str, int]) -> bytes:
    """The bytes that a token's characters stand for."""
    return bytes([byte[character] for character in token])


def check_merges(merges: Iterable, ranks: Mapping[bytes, int], byte: Mapping[str, int]) -> None:
    """Raise ValueError where merging by the list is not merging by ranks."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    listed = [(spelled(left, byte), spelled(right, byte)) for left, right in pairs]
    order = [ranks[left + right] for left, right in listed]
    if order != sorted(order) or not set(listed).issuperset(merges_of(ranks)):
        raise ValueError("its merges do not come in the order of its tokens")


def steps_of(pre_tokenizer: dict) -> list[dict]:
    """The steps of a pre-tokenizer."""
    several = pre_tokenizer["type"] == "Sequence"
    return pre_tokenizer["pretokenizers"] if several else [pre_tokenizer]


def pattern_of(steps: list[dict]) -> str:
    """The pattern that cuts a text as these steps do, the last of which spells its bytes."""
    *cuts, last = steps
    require("pre-tokenizer", last, type=("ByteLevel",), add_prefix_space=(False,))
    by_itself = last.get("use_regex", True)
    if not cuts and by_itself:
        return GPT2_SPLIT
    if len(cuts) == 1 and cuts[0]["type"] == "Digits" and by_itself:
        require("pre-tokenizer", cuts[0], individual_digits=(True,))
        return SINGLE_DIGITS
    if len(cuts) == 1 and not by_itself:
        require("pre-tokenizer", cuts[0], type=("Split",), behavior=("Isolated",), invert=(False,))
        return checked_pattern(cuts[0]["pattern"]["Regex"])
    kinds = " + ".join(step["type"] for step in steps)
    raise ValueError(f"its pre-tokenizer is {kinds}, which nanolm does not read")


def checked_pattern(pattern: str) -> str:
    """The pattern, or the one inside the fallback that bpe_pipeline puts around it.

    Raises ValueError for one that leaves characters out: here each of them would be a piece, and
    there all of them together.
    """
    compiled(pattern)
    before, after = with_fallback("\0").split("\0")
    if pattern.startswith(before) and pattern.endswith(after):
        return pattern.removeprefix(before).removesuffix(after)
    if any(not regex.fullmatch(pattern, chr(i)) for i in range(0x3000)):
        raise ValueError(f"its pattern {pattern!r} does not match every character")
    return pattern


def normal_form_of(normalizer: dict | None) -> str | None:
    """The Unicode form that a normalizer brings a text to."""
    if normalizer is None:
        return None
    require("normalizer", normalizer, type=("NFC", "NFD", "NFKC", "NFKD"))
    return normalizer["type"]


# ------------------------------------------------------------------------------------------
# Writing


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads.

    block_size: how many tokens the model takes. A text gives the ids that encode gives it with all
    special tokens allowed. Raises ValueError for a vocabulary that no merges make.
    """
    if isinstance(tokenizer, CharTokenizer):
        content, end = characters_pipeline(tokenizer), None
    else:
        content = bpe_pipeline(tokenizer)
        end = None if tokenizer.end_of_text is None else tokenizer.end_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # or the family's own is taken
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": end for role in ("bos", "eos", "pad")},
    }
    write_text(folder / PIPELINE, json.dumps(content, indent=1) + "\n")
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def characters_pipeline(tokenizer: CharTokenizer) -> dict:
    """The pipeline that encodes as a tokenizer of characters does."""
    model = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": "<unk>"}  # which is none
    return pipeline(model, steps=[split_by(ANY_CHARACTER)], decoder={"type": "Fuse"})


def bpe_pipeline(tokenizer: BPETokenizer) -> dict:
    """The pipeline that encodes as a byte-level BPE does."""
    byte = byte_of_character()
    character = {i: character for character, i in byte.items()}

    def spell(token: bytes) -> str:
        return "".join(character[i] for i in token)

    vocab = {spell(token): i for token, i in tokenizer.ranks.items()}
    for token in tokenizer.special_tokens:
        foreign = set(byte).issuperset(token) and spelled(token, byte) != token.encode()
        if token in vocab or foreign:
            raise ValueError(f"special token {token!r} would be taken for text: rename it")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab | tokenizer.special_tokens,  # or these may get other ids
        "merges": [[spell(left), spell(right)] for left, right in merges_of(tokenizer.ranks)],
    }
    if tokenizer.pattern == GPT2_SPLIT:
        steps = [byte_level()]
    else:
        steps = [split_by(with_fallback(tokenizer.pattern)), byte_level(use_regex=False)]
    return pipeline(
        model,
        steps=steps,
        added=tokenizer.special_tokens,
        normal_form=tokenizer.normal_form,
        decoder=byte_level(),
    )


def pipeline(
    model: dict,
    *,
    steps: list[dict],
    added: Mapping[str, int] = {},
    normal_form: str | None = None,
    decoder: dict | None = None,
) -> dict:
    """The content of tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for token, i in added.items()
        ],
        "normalizer": normal_form and {"type": normal_form},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def split_by(pattern: str) -> dict:
    """The pre-tokenizer that cuts a text into the matches of a pattern, and what is between."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def byte_level(*, use_regex: bool = True) -> dict:
    """The step that spells bytes as characters, having cut the text by GPT-2's pattern first."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
