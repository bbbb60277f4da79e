"""Laws of getting models from the Hugging Face hub, shown with a hub of our own."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from strategies import scramble

from nanolm.hub.models import export_model
from nanolm.hub.names import find_folder
from nanolm.hub.tokenizers import find_tokenizer
from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.runs.load import load_model
from nanolm.text.tokenizer import BPETokenizer

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "onnx/config.json": b"{}",
    "README.md": b"",
}
PATTERNS = ("config.json", "*.safetensors", "tokenizer.json")
SECONDS = 10  # that a refusal may take: the library is not to try again and again


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks for: the commit, its list of files, and each of them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        self.server.asked.append(path)
        owner, name, kind, _, *file = path.split("/", 4)
        repository = self.server.repositories.get(f"{owner}/{name}", 404)
        if isinstance(repository, int):
            errors = {404: "RepoNotFound", 401: "GatedRepo", 403: "GatedRepo"}
            self.answer(b"", repository, X_Error_Code=errors.get(repository, ""))
        elif kind == "revision":
            self.answer(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}))
        elif kind == "tree":
            oid = "0" * 40
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": oid}
                for path, content in repository.items()
            ]
            self.answer(json.dumps(files))
        else:
            content = repository[file[0]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def answer(self, content, status=200, **headers):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for key, value in {**headers, "Content_Length": len(content)}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(workplace, monkeypatch):
    """A hub on this machine: repositories (name -> its files, or an HTTP status), and asked.

    In this process and in those that it starts huggingface_hub asks nobody else.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.repositories, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    point_to(server.server_port, workplace / "cache", monkeypatch)
    yield SimpleNamespace(repositories=server.repositories, asked=server.asked)
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def point_to(port, cache, monkeypatch):
    """Let huggingface_hub, which has read its environment when it was imported, ask this port."""
    url = f"http://127.0.0.1:{port}"
    values = {"ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    for key, value in {**values, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(constants, key, value)
    names = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    for key, value in {**names, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)


def resolved(hub):
    """The files that the hub was asked for."""
    return {path.split("/", 4)[4] for path in hub.asked if "/resolve/" in path}


# ------------------------------------------------------------------------------------------
# What is fetched


@pytest.mark.parametrize("model", ["owner/name", "o/a.b-c_1"])
def test_only_the_files_that_are_wanted_are_asked_for(hub, model):
    """No pickle and no code, and nothing of the same name in a folder of the repository."""
    hub.repositories[model] = FILES
    folder = find_folder(model, PATTERNS)
    expected = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in expected
    }
    assert resolved(hub) == expected


def test_what_is_here_is_not_fetched_again(hub, monkeypatch):
    """And without the network it is still there."""
    hub.repositories["owner/name"] = FILES
    folder = find_folder("owner/name", PATTERNS)
    hub.asked.clear()
    assert find_folder("owner/name", PATTERNS) == folder
    assert not resolved(hub)
    for status in (500, 404):
        hub.repositories["owner/name"] = status
        assert find_folder("owner/name", PATTERNS) == folder
    point_to(free_port(), constants.HF_HUB_CACHE, monkeypatch)
    assert find_folder("owner/name", PATTERNS) == folder


@pytest.mark.parametrize(
    "full", ["openai-community/gpt2", "openai-community/gpt2-xl", "google-bert/bert-base-uncased"]
)
def test_a_short_name_is_that_of_its_repository_and_of_no_folder(hub, workplace, full):
    name = full.partition("/")[2]
    hub.repositories[full] = FILES
    (workplace / name).mkdir()
    assert (find_folder(name, PATTERNS) / "config.json").read_bytes() == FILES["config.json"]
    assert all(path.startswith(f"{full}/") for path in hub.asked)


def test_a_folder_goes_before_a_model_of_its_name(hub, workplace):
    hub.repositories["owner/name"] = FILES
    folder = workplace / "owner" / "name"
    folder.mkdir(parents=True)
    assert find_folder("owner/name", PATTERNS).samefile(folder)
    with pytest.raises(FileNotFoundError, match="owner/name holds no model"):
        load_model("owner/name")
    assert hub.asked == []


# ------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "get", [lambda name: find_folder(name, PATTERNS), load_model, find_tokenizer]
)
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_what_the_hub_does_not_give_is_refused_soon_and_by_name(hub, get, status, capfd):
    hub.repositories["owner/name"] = status
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"owner/name .*Face hub .*{status}") as e:
        get("owner/name")
    assert "\n" not in str(e.value)
    assert time.monotonic() - start < SECONDS
    assert capfd.readouterr() == ("", "")


def test_without_a_network_the_model_is_refused_soon_and_by_name(hub, workplace, monkeypatch):
    point_to(free_port(), workplace / "cache", monkeypatch)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot get gpt2 .*refused") as e:
        load_model("gpt2")
    assert "\n" not in str(e.value)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    "name",
    ["x", "gpt3", "../x", "./x", "/x", "a/b/c", "a b/c", "a/", "/b", "a/../b", "a/..", "é/b"]
    + ["a/b?c", "a/b#c", "a/b%2f", "a\\b", "a/b\n", "-a/b", "https://a/b", "C:/x", "a\0/b"],
)
def test_a_name_that_the_hub_cannot_have_is_not_sent_to_it(hub, name):
    for get in (lambda name: find_folder(name, PATTERNS), load_model, find_tokenizer):
        with pytest.raises(ValueError, match="nor OWNER/NAME on the Hugging Face hub"):
            get(name)
    assert hub.asked == []


def test_a_path_that_leads_nowhere_is_not_taken_for_a_model_of_the_hub(hub, workplace):
    """A mistyped run in out/ could be the name of somebody's model."""
    hub.repositories["out/typo"] = FILES
    (workplace / "out").mkdir()
    with pytest.raises(ValueError, match="'out/typo' is neither a folder here nor"):
        load_model("out/typo")
    assert hub.asked == []


def test_a_repository_without_a_model_is_refused(hub):
    hub.repositories["owner/name"] = {"README.md": b"", "pytorch_model.bin": b""}
    for get, reason in ((load_model, "holds no model"), (find_tokenizer, "has no tokenizer.json")):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            get("owner/name")
    assert not resolved(hub)


def free_port():
    """A port that nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ------------------------------------------------------------------------------------------
# GPT-2, as the hub has it


@pytest.fixture
def tiny_gpt2(workplace, tiny_text):
    """A small GPT-2 with the files, the keys and the names of the weights that GPT-2's has."""
    tokenizer = BPETokenizer.train([tiny_text], 300)
    shape = {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model = scramble(GPT(ModelConfig(**shape, bias=True)), seed=0)
    folder = workplace / "exported"
    export_model(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: config[key] for key in config if key not in ("nanolm", "n_inner")}
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_file(weights, folder / "model.safetensors")
    changed = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": b'{"model_max_length": 1024}',
    }
    return model, tokenizer, FILES | changed


def test_gpt2_of_the_hub_is_the_model_that_was_put_there(hub, tiny_gpt2):
    model, tokenizer, hub.repositories["openai-community/gpt2"] = tiny_gpt2
    loaded, its_tokenizer, origin, _ = load_model("gpt2")
    assert (its_tokenizer, origin) == (tokenizer, "gpt2")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert find_tokenizer("openai-community/gpt2") == tokenizer


def test_sample_writes_with_a_model_of_the_hub(hub, tiny_gpt2):
    hub.repositories["openai-community/gpt2"] = tiny_gpt2[-1]
    flags = "--init_from=gpt2 --start=wolves --num_samples=1 --max_new_tokens=5 --device=cpu"
    command = [sys.executable, str(ROOT / "sample.py"), *flags.split()]
    done = subprocess.run(command, env=os.environ, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wolves")
    assert "sampling from gpt2" in done.stderr
    assert "pytorch_model.bin" not in resolved(hub)
