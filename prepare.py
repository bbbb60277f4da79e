"""Prepare text for training: python prepare.py NAME [--input PATH ...] [--key=value ...]

Writes data/NAME. Known names (pydocs, pymodules, shakespeare and others) bring their own text.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import dataclass

from nanolm.runs.prepare import TOKENIZER_BYTES, prepare
from nanolm.system.config import load_config
from nanolm.system.script import run_script
from nanolm.text.bpe_tokenizer import END_OF_TEXT
from nanolm.text.data import check_dataset, open_dataset


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The keys of prepare.py."""

    name: str  # the dataset: a folder in data/
    input: tuple[str, ...] = ()  # text or .jsonl files, folders of them, - (stdin), hf:NAME
    task: str | None = None  # causal (also for masked) | classification | tagging | completion
    val_input: tuple[str, ...] = ()  # files for validation; none: a part of input
    label_key: str = "label"  # what holds the label of a text
    pair_keys: tuple[str, ...] = ()  # what a row calls a prompt and its answer, if unusual
    text_key: str = "text"  # what holds the document in a line of .jsonl, or a row of hf:NAME
    separator: str | None = END_OF_TEXT  # what stands between documents; none: nothing
    tokenizer: str | None = None  # char | bpe:N | gpt2 | PATH | OWNER/NAME; None: char or bpe:2048
    tokenizer_bytes: int = TOKENIZER_BYTES  # bpe:N learns from so much text, at most
    val_fraction: float = 0.1  # share of the text, at its end, that is kept for validation
    overwrite: bool = False  # replace a dataset of this name that was made from something else
    check: bool = False  # prepare nothing; compare the files with their fingerprints


def main(arguments: list[str]) -> None:
    config = load_config(PrepareConfig, arguments, positional=("name",))
    if config.check:
        meta = check_dataset(config.name)
    else:
        prepare(
            config.name,
            inputs=config.input,
            task=config.task,
            val_inputs=config.val_input,
            text_key=config.text_key,
            separator=config.separator,
            label_key=config.label_key,
            pair_keys=config.pair_keys,
            tokenizer=config.tokenizer,
            tokenizer_bytes=config.tokenizer_bytes,
            val_fraction=config.val_fraction,
            overwrite=config.overwrite,
        )
        meta = open_dataset(config.name).meta
    print(f"data/{config.name}: {meta['source']}")
    if read := meta.get("read"):
        words = [f"{n:,} {kind if n > 1 else kind[:-1]}" for kind, n in read.items() if n]
        print(f"read     : {', '.join(words)}")
    print(f"tokenizer: {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split in ("train", "val"):
        tokens, size = meta[split]["tokens"], meta[split]["bytes"]
        n = f"{meta[split]['examples']:,} examples, " if "examples" in meta[split] else ""
        start = meta[split]["sha256"][:16]
        print(f"{split:9}: {n}{tokens:,} tokens, {size:,} bytes of text, sha256 {start}...")


if __name__ == "__main__":
    run_script(main, __doc__, PrepareConfig)
