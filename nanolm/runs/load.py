"""A trained model by its name: that of a run, of a folder of Hugging Face's format, or of the hub.

    python -m nanolm.runs.load export OUT_DIR FOLDER

writes it in Hugging Face's format.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from nanolm.hub.models import CONFIG, INDEX, WEIGHTS, export_model, load_pretrained
from nanolm.hub.names import find_folder
from nanolm.hub.tokenizers import FILES
from nanolm.layers import require_choice
from nanolm.model import GPT
from nanolm.runs.folder import holds_a_run, load_trained
from nanolm.system.config import load_config, run_script
from nanolm.text.tokenizer import Tokenizer


def load_model(name: str | Path) -> tuple[GPT, Tokenizer, str]:
    """A trained model, its tokenizer, and where they come from, in words.

    name: the folder of a run or of a pretrained model, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or
    OWNER/NAME on the Hugging Face hub. Raises ValueError or FileNotFoundError where there is none,
    or none that nanolm can express.
    """
    patterns = (CONFIG, WEIGHTS, INDEX, "model-*.safetensors", *FILES)
    folder = find_folder(str(name), patterns)
    if holds_a_run(folder):
        model, tokenizer, step = load_trained(folder)
        return model, tokenizer, f"{name}, step {step}"
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{name} holds no model: neither a run's checkpoints (train one with train.py) nor "
            f"the {CONFIG} of a pretrained one"
        )
    model, tokenizer = load_pretrained(folder)
    return model, tokenizer, str(name)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The words of the command."""

    command: str  # export
    out_dir: str  # the folder of a run, or any other model that init_from could name
    folder: str  # where to write it

    def __post_init__(self):
        require_choice("command", self.command, ("export",))


WORDS = tuple(field.name for field in fields(ExportConfig))


def main(arguments: list[str]) -> None:
    """Do what the command says."""
    config = load_config(ExportConfig, arguments, positional=WORDS)
    model, tokenizer, origin = load_model(config.out_dir)
    architecture = export_model(model, tokenizer, config.folder)
    print(f"{origin}: written to {config.folder} as {architecture}")


if __name__ == "__main__":
    run_script(main, "python -m nanolm.runs.load export OUT_DIR FOLDER", ExportConfig)
