"""Tokenizers in Hugging Face's files, in and out.

tokenizer.json is a pipeline that the package tokenizers runs: a normalizer rewrites the text, a
pre-tokenizer cuts it into pieces, a model turns pieces into tokens, a decoder turns tokens back
into text; added tokens are found in the text before all that. Our own two tokenizers can be said
in it:

                     normalizer     pre-tokenizer                   model       decoder
    characters       none           each character a piece          WordLevel   Fuse
    byte-level BPE   none, or NFC   a pattern, bytes as characters  BPE         ByteLevel

A file that says just what one of them would is read as that one: an export comes back as what it
was, and GPT-2's file is GPT-2. Any other stays a pipeline (see text/pretrained.py).

A last stage, the post-processor, may put tokens around a text. An export does so where the model
was trained on texts, or pairs of them, that were framed.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanolm.bpe import ANY_CHARACTER, GPT2_SPLIT, merges_of, with_fallback
from nanolm.hub.names import find_folder, read_json
from nanolm.layers import ModelConfig
from nanolm.system.files import write_text
from nanolm.text.bpe_tokenizer import END_OF_TEXT
from nanolm.text.conversations import CHAT_TEMPLATE, can_chat
from nanolm.text.documents import read_text
from nanolm.text.gpt2 import FILE as GPT2_FILE
from nanolm.text.gpt2 import byte_of_character
from nanolm.text.pretrained import PretrainedTokenizer, open_pipeline, package
from nanolm.text.tokenizer import (
    TOKENIZER_FILE,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    existing,
    framed,
    load_tokenizer,
    mask_of,
)

PIPELINE, SETTINGS, PIECES = FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: a file, a dataset, a run, a pretrained model, or one of the hub.

    Raises ValueError where there is none.
    """
    path = Path(name)
    if path.name in FILES and path.is_file():  # one of a pretrained model's, and not its folder
        with suppress(ValueError):  # or one of ours that has been given its name
            return load_tokenizer(path)
        return read_tokenizer(path.parent)
    if path.exists() and not is_pretrained(path):
        return load_tokenizer(path)
    return read_tokenizer(find_folder(name, FILES))


def is_pretrained(folder: Path) -> bool:
    """Whether a folder has Hugging Face's file of a tokenizer, and none of ours."""
    ours = any((folder / name).exists() for name in (TOKENIZER_FILE, GPT2_FILE))
    return any((folder / name).exists() for name in (PIPELINE, PIECES)) and not ours


# ------------------------------------------------------------------------------------------
# Reading


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a pretrained model's folder. Raises ValueError, saying what is wrong."""
    path = next((p for p in (folder / PIPELINE, folder / PIECES) if p.exists()), None)
    if path is None:
        raise ValueError(
            f"{folder} has no {PIPELINE}: let transformers write it, with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
        if path.name == PIECES:
            pipeline, said = wordpiece_pipeline(path, settings), "[SEP]"
        else:
            pipeline = open_pipeline(read_text(path))
            said = settings.get("eos_token") or settings.get("sep_token")
        end = said["content"] if isinstance(said, dict) else said or END_OF_TEXT
        tokenizer = as_ours(pipeline, end) or PretrainedTokenizer(pipeline.to_str(), end)
        if said and tokenizer.end_of_text is None:
            raise ValueError(f"its end token {end!r} is none of its tokens")
        return tokenizer
    except Exception as error:  # the package raises no narrower class
        raise ValueError(f"cannot use the tokenizer {path}: {error}") from None


def wordpiece_pipeline(path: Path, settings: dict) -> Any:
    """The pipeline that BERT's vocab.txt means, a piece in each line."""
    lower = settings.get("do_lower_case", True)
    pieces = {line.rstrip(): i for i, line in enumerate(read_text(path).rstrip().split("\n"))}
    hf = package().implementations.BertWordPieceTokenizer(pieces, lowercase=lower)
    return open_pipeline(hf.to_str())


def as_ours(pipeline: Any, end: str) -> Tokenizer | None:
    """The tokenizer of ours that would be written as this pipeline, if there is one."""
    try:
        tokenizer = guess(json.loads(pipeline.to_str()), end)
        written = (meaning(pipeline_of(tokenizer, frames=frames)) for frames in (False, True))
        return tokenizer if meaning(pipeline) in written else None
    except Exception:  # it is of another kind
        return None


def guess(content: dict, end: str) -> Tokenizer:
    """What the pipeline is if it is one of ours; otherwise it may raise anything, or be wrong."""
    vocab, cut = content["model"]["vocab"], content["pre_tokenizer"]
    if content["model"]["type"] == "WordLevel":
        return CharTokenizer("".join(vocab))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte = byte_of_character()
    ranks = {bytes(map(byte.__getitem__, t)): i for t, i in vocab.items() if t not in special}
    pattern = GPT2_SPLIT
    if cut["type"] == "Sequence":
        before, after = with_fallback("\0").split("\0")
        pattern = cut["pretokenizers"][0]["pattern"]["Regex"]
        if not pattern.startswith(before):
            raise ValueError("not written here")  # what follows would take seconds
        pattern = pattern.removeprefix(before).removesuffix(after)
    form = content["normalizer"] and content["normalizer"]["type"]
    if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError("not written here")
    return BPETokenizer(ranks, special, pattern=pattern, end_token=end, normal_form=form)


def meaning(pipeline: Any) -> list:
    """What decides in a pipeline which ids a text gets."""
    content = json.loads(pipeline.to_str())
    model = {key: value for key, value in content["model"].items() if value}  # "" is no affix
    added = content["added_tokens"]
    special = {token["content"] for token in added}  # in some files they are in vocab, too
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in special}
    if content["normalizer"] is None:
        added = [token | {"normalized": False} for token in added]
    some = next(iter(model["vocab"]), "")
    texts = [pipeline.encode(*several).ids for several in ((some,), (some, some))]
    return [model, added, content["normalizer"], content["pre_tokenizer"], texts]


# ------------------------------------------------------------------------------------------
# Writing


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model: ModelConfig) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads, for such a model.

    A text gives the ids that encode gives it with all special tokens allowed; framed, where the
    model labels texts or words, or answers by an encoder and a decoder. Raises ValueError for a
    vocabulary that no merges make.
    """
    names = {i: token for token, i in tokenizer.special_tokens.items()}
    end = names.get(tokenizer.end_of_text)
    begin = names.get(tokenizer.begin_of_text, end)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # or the family's own is taken
        "model_max_length": model.block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        "eos_token": end,
    }
    if can_chat(tokenizer):
        settings["chat_template"] = CHAT_TEMPLATE
    if not model.causal:
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        settings |= {"cls_token": begin, "sep_token": end, "pad_token": end}
        settings["mask_token"] = names.get(mask_of(tokenizer))
        settings["model_input_names"] = inputs if model.n_types else inputs[::2]
    if model.n_encoder_layer:
        settings["pad_token"] = end
    frames = model.head != "tokens" or model.n_encoder_layer > 0
    pipeline = pipeline_of(tokenizer, frames=frames)
    write_text(folder / PIPELINE, pipeline.to_str(pretty=True) + "\n")
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def pipeline_of(tokenizer: Tokenizer, *, frames: bool = False) -> Any:
    """The tokenizers.Tokenizer that encodes as a tokenizer here does, with all special tokens.

    frames: it also puts around each text, or pair of texts, what framed puts there.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        pipeline = open_pipeline(tokenizer.pipeline)
    elif isinstance(tokenizer, BPETokenizer):
        pipeline = bpe_pipeline(tokenizer)
    else:
        return character_pipeline(tokenizer)
    if frames and pipeline.encode("", "").ids != framed(tokenizer, [], []):
        pipeline = package().Tokenizer.from_str(pipeline.to_str())  # others use the first one
        pipeline.post_processor = frame(tokenizer, pipeline)
    return pipeline


def frame(tokenizer: Tokenizer, pipeline: Any) -> Any:
    """The last stage of a pipeline that puts around its texts what framed does."""
    ids = (existing(i) for i in (tokenizer.begin_of_text, tokenizer.end_of_text))
    begin, end = (list(map(pipeline.id_to_token, found)) for found in ids)
    hf = package().processors
    template = hf.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, pipeline.token_to_id(token)) for token in {*begin, *end}],
    )
    trim = hf.ByteLevel(add_prefix_space=False, trim_offsets=True)  # a word without its blank
    return hf.Sequence([trim, template])


def character_pipeline(tokenizer: CharTokenizer) -> Any:
    """The pipeline that gives each character its id."""
    hf = package()
    pipeline = hf.Tokenizer(hf.models.WordLevel(tokenizer.ids, unk_token="<unk>"))  # which is none
    pipeline.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(ANY_CHARACTER), "isolated")
    pipeline.decoder = hf.decoders.Fuse()
    return pipeline


def bpe_pipeline(tokenizer: BPETokenizer) -> Any:
    """The pipeline that encodes as a byte-level BPE does."""
    hf = package()
    character = {byte: character for character, byte in byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    vocab = {spell(token): i for token, i in tokenizer.ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in merges_of(tokenizer.ranks)]
    special = tokenizer.special_tokens
    pipeline = hf.Tokenizer(hf.models.BPE(vocab | special, merges))
    if tokenizer.normal_form:
        pipeline.normalizer = getattr(hf.normalizers, tokenizer.normal_form)()
    by_gpt2 = tokenizer.pattern == GPT2_SPLIT
    spell_bytes = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2)
    cut = hf.pre_tokenizers.Split(hf.Regex(with_fallback(tokenizer.pattern)), "isolated")
    several = hf.pre_tokenizers.Sequence([cut, spell_bytes])
    pipeline.pre_tokenizer = spell_bytes if by_gpt2 else several
    pipeline.decoder = hf.decoders.ByteLevel()
    pipeline.add_special_tokens(sorted(special, key=special.get))
    for token, i in special.items():
        if token in vocab or pipeline.decode([i], skip_special_tokens=False) != token:
            raise ValueError(f"special token {token!r} would be taken for text: rename it")
    return pipeline
