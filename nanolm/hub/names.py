"""Pretrained models by their names: in a folder here, or on the Hugging Face hub.

A model of the hub is called OWNER/NAME; GPT-2 and BERT have short names, too. What is
downloaded is data and no code: JSON, texts, and safetensors. huggingface_hub, which does it, keeps
the files for the next time.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from nanolm.system.files import json_of

OWNERS = {
    "openai-community": ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    "google-bert": ("bert-base-uncased", "bert-base-cased", "bert-large-uncased"),
}
SHORT_NAMES = {name: f"{owner}/{name}" for owner, names in OWNERS.items() for name in names}


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the hub's, and not a path here that leads nowhere."""
    if name in SHORT_NAMES:
        return True
    pattern = r"\w[\w.-]*/\w[\w.-]*"
    return bool(re.fullmatch(pattern, name, re.ASCII)) and not Path(name).parent.exists()


def find_folder(name: str, files: Iterable[str]) -> Path:
    """The folder of that name, or one with those of the files that the hub has under it.

    files: names, or patterns as "*.txt". Raises ValueError where there is no such folder and the
    hub does not give it.
    """
    if name and Path(name).is_dir() and name not in SHORT_NAMES:
        return Path(name)
    if not is_hub_name(name):
        raise ValueError(
            f"{name!r} is neither a folder here nor OWNER/NAME on the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} needs the package huggingface_hub: pip install huggingface_hub safetensors"
        ) from None
    try:
        return Path(snapshot_download(SHORT_NAMES.get(name, name), allow_patterns=list(files)))
    except Exception as error:  # of many kinds: no network, no such model, no access, a full disk
        reason = shorten(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"cannot get {name} from the Hugging Face hub ({reason}); or name a folder that exists"
        ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError where it holds something else."""
    try:
        content = json_of(path)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def require(what: str, found: Mapping[str, Any], **allowed: tuple) -> None:
    """Raise ValueError for the first key that has none of the allowed values, or is missing."""
    for key, values in allowed.items():
        if (value := found.get(key)) not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"its {what} has {key} {value!r}, and nanolm reads {wanted}")
