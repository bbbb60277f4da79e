"""What the benchmarks need of a checkout of github.com/karpathy/nanoGPT; it is left as it is."""

import importlib.util
import pickle
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from nanolm.text.data import Dataset

# The CPU run of its README, and the baby GPT's on one GPU.
CPU_RUN = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
GPU_RUN = "config/train_shakespeare_char.py"


def model_module(checkout: Path) -> ModuleType:
    """Its model.py, imported."""
    for name in ("model.py", "train.py"):
        if not (checkout / name).is_file():
            raise FileNotFoundError(f"{checkout} is no checkout of nanoGPT: it has no {name}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_with_data(checkout: Path, folder: Path, dataset: Dataset) -> None:
    """A copy of its code in folder, with the dataset that its prepare.py would make of the text.

    The ids are the same, since both number the sorted characters.
    """
    skipped = shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*", "assets")
    shutil.copytree(checkout, folder, ignore=skipped, dirs_exist_ok=True)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        getattr(dataset, split).astype(np.uint16).tofile(data / f"{split}.bin")
    # From this file it learns the size of its vocabulary; without it, it takes GPT-2's.
    content = {"vocab_size": dataset.tokenizer.vocab_size}
    (data / "meta.pkl").write_bytes(pickle.dumps(content))


def trained_model(checkout: Path, path: Path, vocab_size: int) -> nn.Module:
    """The model of one of its checkpoints; ValueError where its vocabulary is not of this size."""
    module = model_module(checkout)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    found = saved["model_args"]["vocab_size"]
    if found != vocab_size:
        raise ValueError(
            f"{path} has {found} tokens and the dataset {vocab_size}: no fair contest"
        )
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    return model.eval()
