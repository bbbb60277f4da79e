"""Laws of exported models behind servers: the official client gets what sample.py prints.

The servers are llama-cpp-python's and transformers'; where a package of theirs is not installed,
its laws are skipped. Each is a process of its own on a free port of this machine.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import openai
import pytest
from children import free_port
from conftest import ROOT, TINY, run_here

pytestmark = pytest.mark.long  # imports of the servers alone take many seconds

NEEDED = {
    "llama.cpp": ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context"),
    "transformers": ("transformers", "fastapi", "uvicorn", "accelerate"),
}
BLOCK_SIZE = 256
ANIMALS = ("wolf", "fox", "owl")
ASKED = [f"{i} {ANIMALS[i % 3]}s and {i % 4} more?" for i in range(60)]
ANSWERS = [f"They are {i + i % 4} {ANIMALS[i % 3]}s.\nAll {i + i % 4} ran." for i in range(60)]
OPENING = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def train_a_model_that_answers() -> None:
    """In out/talk, so well that it writes text, and ends it."""
    with open("talk.jsonl", "w", encoding="utf-8") as file:
        for pair in zip(ASKED, ANSWERS, strict=True):
            said = zip(("user", "assistant"), pair, strict=True)
            messages = [{"role": role, "content": text} for role, text in said]
            file.write(json.dumps({"messages": messages}) + "\n")
    prepared = ["--task=completion", "--input=talk.jsonl", "--tokenizer=bpe:300"]
    assert run_here("prepare", "talk", *prepared) == 0
    flags = [*TINY, "--task=completion", "--dataset=talk", "--out_dir=out/talk"]
    flags += ["--norm=rms", "--position=rotary", "--mlp=swiglu", "--qk_norm=true", "--n_layer=2"]
    flags += [f"--block_size={BLOCK_SIZE}", "--n_embd=64", "--max_iters=150", "--bias=false"]
    flags += ["--eval_interval=150", "--batch_size=4", "--learning_rate=0.01"]
    assert run_here("train", *flags, "--warmup_iters=10", "--eval_answers=0") == 0


@contextmanager
def serving(words: list[str], port: int, log: Path) -> Iterator[None]:
    """Within this, a server runs and answers."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=offline)
    try:
        until = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    """Whether anything answers there, with whatever status."""
    try:
        urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except HTTPError as error:
        error.close()
    except (URLError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run, out/talk, and its exports, talk and talk.gguf."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_a_model_that_answers()
        for target in ("talk", "talk.gguf"):
            assert run_here("nanolm/runs/export", "out/talk", target) == 0
    return folder


@pytest.fixture(scope="module", params=NEEDED)
def server(request, place):
    """One of the servers: its name, the official client, its model's name, and its URL."""
    for package in NEEDED[request.param]:
        pytest.importorskip(package)
    port = free_port()
    if request.param == "llama.cpp":
        model = str(place / "talk.gguf")
        words = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--n_threads", "1"]
        words += ["--n_ctx", f"{BLOCK_SIZE}", "--port", f"{port}", "--type_k", "0"]
        words += ["--type_v", "0", "--host", "127.0.0.1"]  # 0: keys and values in float32
    else:
        model = str(place / "talk")
        program = Path(sys.executable).with_name("transformers")
        words = [str(program), "serve", model, "--port", f"{port}", "--host", "127.0.0.1"]
        words += ["--device", "cpu"]
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    with serving(words, port, place / f"{request.param}.log"), client:
        yield SimpleNamespace(name=request.param, client=client, model=model, url=url)


@pytest.fixture
def printed(place, run_main, monkeypatch) -> Callable[[str], str]:
    """printed(prompt): what sample.py prints, each time the likeliest token."""
    monkeypatch.chdir(place)

    def sample(prompt: str) -> str:
        flags = ("--temperature=0", "--device=cpu", "--dtype=float32", "--max_new_tokens=40")
        code, out, err = run_main("sample", "--out_dir=out/talk", f"--start={prompt}", *flags)
        assert code == 0, err
        return out.removesuffix("\n---------------\n")

    return sample


def ask(server, prompt: str, **options) -> str:
    """The answer to a prompt, as it is served: the likeliest, or by some other options."""
    options = {"max_tokens": 40, "temperature": 0} | options
    messages = [{"role": "user", "content": prompt}]
    made = server.client.chat.completions.create(model=server.model, messages=messages, **options)
    return made.choices[0].message.content


def complete(server, text: str, **options) -> str:
    """What follows a text."""
    options = {"max_tokens": 40, "temperature": 0} | options
    made = server.client.completions.create(model=server.model, prompt=text, **options)
    return made.choices[0].text


def test_the_likeliest_answer_is_what_sample_prints(server, printed):
    """Asked for as an answer, and as what follows the conversation as a text."""
    for prompt in ASKED[:5]:
        written = complete(server, OPENING.format(prompt))
        assert ask(server, prompt) == written == printed(prompt)
    assert printed(ASKED[3]).startswith("They are ")  # it has learned to write


def test_the_example_of_the_page_holds(server, capsys):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert "http://localhost:8000/v1" in example
    capsys.readouterr()
    own = example.replace("http://localhost:8000/v1", server.url)
    exec(own.replace("./mymodel", server.model), {})
    assert capsys.readouterr().out.strip()


def test_a_stream_brings_the_same_text_in_pieces(server, printed):
    messages = [{"role": "user", "content": ASKED[7]}]
    options = {"model": server.model, "max_tokens": 40, "temperature": 0, "stream": True}
    chunks = server.client.chat.completions.create(messages=messages, **options)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(piece or "" for piece in pieces) == printed(ASKED[7])


def test_an_answer_stops_at_a_text(server, printed):
    """transformers gives the text with it at which it stops."""
    whole = printed(ASKED[7])
    found = complete(server, OPENING.format(ASKED[7]), stop=[" ran"])
    assert " ran" in whole
    stopped = whole[: whole.index(" ran")]
    assert found == stopped + (" ran" if server.name == "transformers" else "")


def test_a_seed_repeats_a_text_and_another_one_draws_another(server):
    """After a text of which the model knows nothing: its answers it knows by heart."""
    options = {"temperature": 1.5, "max_tokens": 30}
    texts = [complete(server, "fox, ", seed=seed, **options) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_fifty_requests_at_once_get_the_answers_of_one_at_a_time(server):
    alone = [ask(server, prompt) for prompt in ASKED[:10]]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda i: ask(server, ASKED[i % 10]), range(50)))
    assert together == alone * 5


def test_a_prompt_longer_than_the_context_is_refused_or_read_all_the_same(server):
    """llama.cpp refuses it; transformers goes beyond what the model has learned."""
    long = "wolf " * BLOCK_SIZE
    if server.name == "transformers":
        assert isinstance(ask(server, long, max_tokens=5), str)
        return
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, long)
    assert error.value.code == "context_length_exceeded"
    assert f"{BLOCK_SIZE} tokens" in error.value.message


NO_OBJECTS = [b"", b"{", b"[]", b"5", b"\xff\xfe\x00", b"[" * 100_000]
ODD = [b"{}", b'{"messages": 5}', b'{"prompt": {}}']
ODD += [b'{"messages": [{"role": 7}], "max_tokens": "x"}']


def status_of(url: str, body: bytes) -> int:
    """What a server says to a request."""
    headers = {"Content-Type": "application/json"}
    try:
        with urlopen(Request(url, data=body, headers=headers), timeout=60) as response:
            return response.status
    except HTTPError as error:
        error.close()
        return error.code


def test_no_garbage_ends_the_server(server, printed):
    """What is no object is refused; what an odd one lacks, llama-cpp-python takes for empty."""
    for path in ("completions", "chat/completions"):
        found = [status_of(f"{server.url}/{path}", body) for body in NO_OBJECTS + ODD]
        assert set(found[: len(NO_OBJECTS)]) <= {400, 422, 500}
    assert ask(server, ASKED[2]) == printed(ASKED[2])
