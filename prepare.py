"""Prepare text for training: python prepare.py NAME [--input PATH ...] [--key=value ...]

Writes data/NAME. Known names (pydocs, shakespeare_char) bring their own text.
"""

from dataclasses import dataclass

from nanolm.config import load_config, run_script
from nanolm.data import check_dataset, open_dataset, prepare


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The keys of prepare.py."""

    name: str  # the dataset: a folder in data/
    input: tuple[str, ...] = ()  # text files, and folders of them
    tokenizer: str | None = None  # char; None: the known dataset's own, else char
    val_fraction: float = 0.1  # share of the text, at its end, that is kept for validation
    check: bool = False  # prepare nothing; compare the files with their fingerprints


def main(arguments: list[str]) -> None:
    config = load_config(PrepareConfig, arguments, positional="name")
    if config.check:
        meta = check_dataset(config.name)
    else:
        prepare(
            config.name,
            inputs=config.input,
            tokenizer=config.tokenizer,
            val_fraction=config.val_fraction,
        )
        meta = open_dataset(config.name).meta
    print(f"data/{config.name}: {meta['source']}")
    print(f"tokenizer: {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split in ("train", "val"):
        tokens, size = meta[split]["tokens"], meta[split]["bytes"]
        start = meta[split]["sha256"][:16]
        print(f"{split:9}: {tokens:,} tokens, {size:,} bytes of text, sha256 {start}...")


if __name__ == "__main__":
    run_script(main, __doc__, PrepareConfig)
