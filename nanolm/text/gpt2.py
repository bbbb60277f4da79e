"""GPT-2's own vocabulary, from OpenAI's files.

encoder.json maps each token to its id. The ids are in the order of the merges, so it is all one
needs; vocab.bpe, which comes with it, says the same once more.
"""

from pathlib import Path

from nanolm.system.files import json_of, sha256

FILE = "encoder.json"
SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def download() -> dict[bytes, int]:
    """The ranks of the tokens, as tiktoken downloads, checks and keeps them."""
    from tiktoken_ext.openai_public import gpt2  # here, for few need it

    return gpt2()["mergeable_ranks"]


def read(path: Path) -> dict[bytes, int]:
    """The ranks of the tokens, from encoder.json. Raises ValueError for another file."""
    if sha256(path) != SHA256:
        raise ValueError(f"{path} is another file: its sha256 differs")
    ids = json_of(path)
    del ids["<|endoftext|>"]  # no token of the text
    byte = byte_of_character()
    return {bytes([byte[character] for character in token]): i for token, i in ids.items()}


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: the byte behind each character of a token in its files.

    What Latin-1 can print stands for itself; other bytes are the characters from U+0100 on, so
    that no token holds a blank.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
