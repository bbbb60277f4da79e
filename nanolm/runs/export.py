"""Hand a trained model on, in Hugging Face's format or in GGUF.

python -m nanolm.runs.export RUN TARGET [--dtype=f32]
"""

from dataclasses import dataclass
from pathlib import Path

from nanolm.hub.gguf import SUFFIX, export_gguf
from nanolm.hub.models import export_model
from nanolm.runs.load import load_model
from nanolm.system.config import load_config
from nanolm.system.script import run_script

WORDS = ("run", "target")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The words and the key of the command."""

    run: str  # the folder of a run, or any other model that init_from could name
    target: str  # a new folder, for Hugging Face's format, or a new file.gguf, for llama.cpp
    dtype: str = "f32"  # of a .gguf file's matrices: f32 | f16 | q8_0 (8 bits)

    def __post_init__(self):
        if self.dtype != "f32" and not self.of_one_file:
            raise ValueError(
                f"dtype={self.dtype!r}: a folder is written in f32; name a file that ends in "
                f"{SUFFIX}"
            )

    @property
    def of_one_file(self) -> bool:
        return Path(self.target).suffix.lower() == SUFFIX


def main(arguments: list[str]) -> None:
    """Load the model and write it."""
    config = load_config(ExportConfig, arguments, positional=WORDS)
    model, tokenizer, origin, _ = load_model(config.run)
    if config.of_one_file:
        name = export_gguf(model, tokenizer, config.target, dtype=config.dtype)
        kind = f"{name}, {config.dtype}"
    else:
        kind = export_model(model, tokenizer, config.target)
    print(f"{origin}: written to {config.target} as {kind}")


if __name__ == "__main__":
    run_script(main, __doc__, ExportConfig)
