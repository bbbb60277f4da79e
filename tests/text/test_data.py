"""Laws of datasets: the files hold the text, whole or not at all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, TINY
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanolm.runs import prepare as runs_prepare
from nanolm.runs.prepare import find_dataset, make_tokenizer, prepare
from nanolm.text import data
from nanolm.text import documents as documents_module
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.char_tokenizer import CharTokenizer
from nanolm.text.corpus import Corpus, find_corpus
from nanolm.text.data import (
    SPLITS,
    Dataset,
    check_dataset,
    narrowest_dtype,
    open_dataset,
    write_dataset,
)
from nanolm.text.documents import documents
from nanolm.text.known import KnownDataset
from nanolm.text.tokenizer import Tokenizer

BPE = BPETokenizer.train([TEXT], 300)
END_FIRST = BPETokenizer({token: i + 1 for token, i in BPE.ranks.items()}, {END_OF_TEXT: 0})


@given(st.integers(1, 2**31) | st.sampled_from([256, 257, 2**16, 2**16 + 1]))
def test_the_narrowest_type_holds_the_largest_id(vocab_size):
    """Ids written as uint16 wrap silently: 70000 would become 4464."""
    dtype = narrowest_dtype(vocab_size)
    assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1
    assert dtype.kind == "u"
    if dtype.itemsize > 1:
        assert dtype.str[0] == "<"
        assert vocab_size - 1 >= 256 ** (dtype.itemsize // 2)


def corpus_of(*texts: str) -> Corpus:
    return Corpus("a test", lambda: documents(texts))


def encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """The ids that a dataset of these documents holds."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return [i for text in texts if text for i in [*tokenizer.encode(text), *end]]


def all_ids(dataset: Dataset) -> list[int]:
    return [*dataset.train.tolist(), *dataset.val.tolist()]


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def texts_here(workplace) -> Path:
    """The current folder, with a.txt and b.txt."""
    Path("a.txt").write_text("to be or not to be")
    Path("b.txt").write_text("that is the question")
    return workplace


# ------------------------------------------------------------------------------------------
# The files


@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from([END_OF_TEXT, f"1 little{END_OF_TEXT} wolf"]),
        min_size=1,
        max_size=5,
    ),
    val_fraction=st.floats(0.05, 0.95),
    tokenizer=st.sampled_from([None, BPE, END_FIRST]),
)
def test_a_dataset_is_the_encoded_documents_each_with_its_end(
    tmp_path_factory, texts, val_fraction, tokenizer
):
    """Characters have no token for that end, and in a text its name is ordinary characters."""
    n_ends = sum(map(bool, texts)) if tokenizer else 0
    tokenizer = tokenizer or CharTokenizer.train(texts)
    ids = encoded(tokenizer, texts)
    cut = int(len(ids) * (1 - val_fraction))
    assume(cut >= 2 and len(ids) - cut >= 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("data"))
        write_dataset(Path("data/x"), corpus_of(*texts), tokenizer, val_fraction=val_fraction)
        dataset = open_dataset("x")
        assert check_dataset("x") == dataset.meta
        assert dataset.train.dtype == narrowest_dtype(tokenizer.vocab_size)
    assert (dataset.train.tolist(), dataset.val.tolist()) == (ids[:cut], ids[cut:])
    assert ids.count(tokenizer.end_of_text) == n_ends
    for split in SPLITS:
        tokens = [i for i in getattr(dataset, split).tolist() if i != tokenizer.end_of_text]
        assert dataset.meta[split]["tokens"] == len(getattr(dataset, split))
        assert dataset.meta[split]["bytes"] == len(tokenizer.decode_bytes(tokens))
    whole = sum(dataset.meta[split]["bytes"] for split in SPLITS)
    assert whole == len("".join(texts).encode())
    assert dataset.bytes_per_token == dataset.meta["val"]["bytes"] / len(dataset.val)


def test_blocks_and_bundles_do_not_change_a_dataset(workplace, monkeypatch):
    Path("a.txt").write_text(TEXT)
    Path("b.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 3)
    made = []
    for block, bundle in [(2**20, 2**20), (99, 199), (99, 1)]:
        monkeypatch.setattr(documents_module, "BLOCK", block)
        monkeypatch.setattr(data, "BUNDLE", bundle)
        folder = prepare(f"x{block}{bundle}", inputs=("a.txt", "b.jsonl"), tokenizer="bpe:300")
        made.append(content(folder))
    assert all_ids(open_dataset(folder.name)) == encoded(BPE, [TEXT] * 4)
    assert made[0] == made[1] == made[2]


def test_a_separator_becomes_the_token_that_ends_a_document(texts_here, run_main):
    """As in TinyStories: the token was seen 0 times in training, and its name 720 times."""
    stories = f"One wolf.\n{END_OF_TEXT}\n" * 720
    Path("stories.txt").write_text(stories + "And a fox.\n")
    out = run_main("prepare", "x", "--input=stories.txt", "--tokenizer=bpe:270")[1]
    assert "read     : 1 file, 721 documents, 720 separators\n" in out
    dataset = open_dataset("x")
    ids, tokenizer = all_ids(dataset), dataset.tokenizer
    assert ids == encoded(tokenizer, ["One wolf.\n"] * 720 + ["And a fox.\n"])
    kept = prepare("y", inputs=("stories.txt",), tokenizer="data/x", separator=None)
    assert all_ids(open_dataset(kept.name)) == encoded(tokenizer, [stories + "And a fox.\n"])
    run_main("prepare", "z", "--input=stories.txt", "--separator=wolf.")
    assert open_dataset("z").meta["read"] == {"files": 1, "documents": 721, "separators": 720}


def test_the_meta_file_tells_where_the_text_is_from(texts_here):
    meta = json.loads((prepare("x", inputs=("a.txt", "b.txt")) / "meta.json").read_text())
    assert (meta["source"], meta["tokenizer"]) == ("a.txt, b.txt", "char")
    assert meta["vocab_size"] == len(set("to be or not to be that is the question"))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("n.txt", "to be\n" * 7 + "nob\u00e9\n", "n.txt, line 8"),
        ("n.txt", f"to be{END_OF_TEXT}\n\nno\nb\u00e9", "n.txt, line 4"),
        ("n.jsonl", '{"text": "to be"}\n{"text": "no\\nb\u00e9"}', "n.jsonl, line 2"),
    ],
)
@pytest.mark.parametrize("block", [9, 2**20])
def test_a_character_without_an_id_is_named_with_its_file_and_line(
    name, content, place, block, texts_here, monkeypatch
):
    monkeypatch.setattr(documents_module, "BLOCK", block)
    Path(name).write_text(content, encoding="utf-8")
    prepare("x", inputs=("a.txt",))
    CharTokenizer("\nabenort ").save("t.json")
    with pytest.raises(ValueError, match=rf"^{place}: character '\u00e9' .*, at position \d,"):
        prepare("y", inputs=("a.txt", name), tokenizer="t.json")


def test_a_character_of_a_labelled_text_without_an_id_is_named_with_its_line(texts_here):
    Path("k.csv").write_text(
        "text,label\nto,x\nb\u00e9,y\n" + "to,x\nto,y\n" * 9, encoding="utf-8"
    )
    CharTokenizer("bot").save("char.json")
    with pytest.raises(ValueError, match=r"^k\.csv, line 3: character '\u00e9'"):
        prepare("y", inputs=("k.csv",), task="classification", tokenizer="char.json")


def test_a_text_of_its_own_can_be_for_validation(texts_here, run_main):
    Path("v.txt").write_text("question of bees")
    command = ("prepare", "x", "--input=a.txt", "--val_input=v.txt", "--tokenizer=bpe:258")
    assert run_main(*command)[0] == 0
    dataset = open_dataset("x")
    assert dataset.train.tolist() == encoded(dataset.tokenizer, ["to be or not to be"])
    assert dataset.val.tolist() == encoded(dataset.tokenizer, ["question of bees"])
    assert dataset.meta["read"] == {"files": 2, "documents": 2, "separators": 0}
    check_dataset("x")
    prepare("y", inputs=("a.txt",), val_inputs=("v.txt",))
    assert open_dataset("y").tokenizer == CharTokenizer("to be or not to be question of bees")


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.95, 1 - 1e-6])
def test_a_fraction_that_leaves_too_little_is_blamed_and_not_the_text(fraction, texts_here):
    with pytest.raises(
        ValueError, match=rf"^val_fraction={fraction}: .* choose 0\.11 to 0\.888889, or"
    ):
        prepare("x", inputs=("a.txt",), val_fraction=fraction)
    for good in (0.12, 0.88):
        prepare("x", inputs=("a.txt",), val_fraction=good, overwrite=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
def test_a_full_disk_names_the_file_and_the_bytes_that_are_needed(texts_here, monkeypatch):
    Path("long.txt").write_text(TEXT * 99)
    path = Path("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device \(about (\d+),000 bytes") as error:
        data.write_array(np.zeros(3_000, "<u2"), path)
    assert (error.value.filename, "about 6,000" in str(error.value)) == ("/dev/full", True)
    found = find_corpus(["long.txt"])
    encode = partial(data.encode_parts, tokenizer=BPE, dtype=np.dtype("<u2"))
    monkeypatch.setattr(documents_module, "BLOCK", 10_000)
    monkeypatch.setattr(data, "BUNDLE", 10_000)
    with pytest.raises(OSError, match="No space left") as error:
        data.encode_corpus(found, encode, path)
    needed = int(re.search(r"about ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    assert needed == pytest.approx(2 * len(BPE.encode(TEXT)) * 99, rel=0.5)


def test_a_failed_preparation_leaves_the_old_dataset(texts_here):
    """Nothing is lost, and nothing is half written."""
    before = content(prepare("x", inputs=("a.txt",)))
    Path("short.txt").write_text("ab")
    with pytest.raises(ValueError, match="too short"):
        prepare("x", inputs=("short.txt",), overwrite=True)
    assert content("data/x") == before


# ------------------------------------------------------------------------------------------
# The tokenizer


@given(st.lists(st.text("ab \u20ac", min_size=1), min_size=1), st.integers(0, 2))
def test_a_tokenizer_learns_from_the_first_bytes_alone(texts, inside):
    """Also where the limit falls inside a character."""
    size = len("".join(texts).encode()) + inside
    found = corpus_of(*texts[:-1], texts[-1] + "\u20ac and more", "and more")
    learned = make_tokenizer("bpe:262", found, tokenizer_bytes=size)
    assert learned == BPETokenizer.train(texts, 262)


@pytest.mark.parametrize("path", ["data/first", "data/first/nanolm_tokenizer.json"])
def test_a_dataset_can_take_over_the_tokenizer_of_another(path, texts_here):
    prepare("first", inputs=("a.txt", "b.txt"), tokenizer="bpe:259", tokenizer_bytes=18)
    prepare("second", inputs=("b.txt",), tokenizer=path)
    dataset = open_dataset("second")
    assert dataset.tokenizer == BPETokenizer.train(["to be or not to be"], 259)
    assert dataset.meta["tokenizer"] == "bpe:259"
    assert all_ids(dataset) == encoded(dataset.tokenizer, ["that is the question"])


def test_a_run_can_continue_with_another_text_and_its_own_tokenizer(tiny_run, run_main):
    Path("b.txt").write_text("7 foxes met 49 little wolves.\n" * 9)
    run_main("prepare", "other", "--input=b.txt", f"--tokenizer={tiny_run}")
    words = ("--dataset=other", f"--init_from={tiny_run}", "--out_dir=out/other")
    assert run_main("train", *TINY, *words)[0::2] == (0, "")
    kept, taken = (content(run)["nanolm_tokenizer.json"] for run in (tiny_run, "out/other"))
    assert kept == taken


@pytest.fixture
def known_datasets(workplace, monkeypatch):
    """Two known datasets: tiny, of characters, and words, of GPT-2's tokens."""
    text = corpus_of("to be or not to be")
    known = {"tiny": KnownDataset(lambda _: text, "char")}
    known["words"] = KnownDataset(lambda _: text, "gpt2")
    for module in (data, runs_prepare):
        monkeypatch.setattr(module, "KNOWN_DATASETS", known)


def test_a_known_dataset_is_prepared_on_first_use(known_datasets):
    assert find_dataset("tiny").meta["source"] == "a test"
    meta = Path("data/tiny/meta.json")
    meta.write_text(meta.read_text().replace('"a test"', '"the first"'))
    assert find_dataset("tiny").meta["source"] == "the first"
    BPE.save("bpe.json")
    prepare("tiny", tokenizer="bpe.json", overwrite=True)
    assert find_dataset("tiny").tokenizer == BPE


# ------------------------------------------------------------------------------------------
# Prepared before


def test_the_same_preparation_is_done_once(texts_here, capsys):
    before = content(prepare("x", inputs=("a.txt",)))
    Path("data/x/train.bin").unlink()
    capsys.readouterr()
    prepare("x", inputs=("a.txt",))
    assert re.fullmatch(
        r"data/x is there already, .*--overwrite=true.*\n", capsys.readouterr().out
    )
    assert not Path("data/x/train.bin").exists()
    assert content(prepare("x", inputs=("a.txt",), overwrite=True)) == before


@pytest.mark.parametrize(
    ("asked", "differs"),
    [
        ({"inputs": ("b.txt",)}, "input is a.txt there and b.txt here; bytes is 18 there and 20"),
        ({"tokenizer": "bpe:259"}, "tokenizer is char there and bpe:259 here"),
        ({"val_fraction": 0.2}, r"val_fraction is 0\.1 there and 0\.2 here"),
    ],
)
def test_another_dataset_of_the_same_name_is_not_replaced_unasked(asked, differs, texts_here):
    """A person then trained on the wrong one."""
    before = content(prepare("x", inputs=("a.txt",)))
    asked = {"inputs": ("a.txt",)} | asked
    with pytest.raises(ValueError, match=rf"another dataset \({differs}.*--overwrite=true"):
        prepare("x", **asked)
    assert content("data/x") == before
    prepare("x", **asked, overwrite=True)
    assert content("data/x") != before


def test_a_text_that_has_grown_is_another(texts_here):
    prepare("x", inputs=("a.txt",))
    Path("a.txt").write_text("to be or not to be, that")
    with pytest.raises(ValueError, match="bytes is 18 there and 24 here"):
        prepare("x", inputs=("a.txt",))


def test_a_dataset_from_before_tasks_is_one_of_the_causal_task(texts_here):
    """And nobody knows what it was made with."""
    meta = prepare("x", inputs=("a.txt",)) / "meta.json"
    fields = json.loads(meta.read_text())
    assert fields.pop("task") == open_dataset("x").meta["task"] == "causal"
    del fields["made_with"]
    meta.write_text(json.dumps(fields))
    assert open_dataset("x").meta["task"] == "causal"
    with pytest.raises(ValueError, match="input is unknown there and a"):
        prepare("x", inputs=("a.txt",))


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "nanolm_tokenizer.json"])
def test_a_file_of_the_same_size_and_other_content_is_found_by_the_check(file, texts_here):
    path = prepare("x", inputs=("a.txt",)) / file
    check_dataset("x")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"benort", b"tonber") if file.endswith("json") else data[::-1])
    open_dataset("x")
    with pytest.raises(ValueError, match=rf"{file} has changed since it was prepared"):
        check_dataset("x")


# ------------------------------------------------------------------------------------------
# Interrupted


def test_a_killed_preparation_leaves_no_dataset_that_could_be_taken_for_one(
    texts_here, monkeypatch
):
    """Killed at any rename, the folder opens as the old text, as the new one, or not at all."""
    replace, outcomes = os.replace, []
    for survived in range(20):
        prepare("x", inputs=("a.txt",), overwrite=True)
        calls = iter(range(1000))

        def replace_until_killed(source, target, calls=calls, survived=survived):
            if next(calls) >= survived:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_until_killed)
        try:
            prepare("x", inputs=("b.txt",), overwrite=True)
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        try:
            check_dataset("x")
            dataset = open_dataset("x")
            outcomes.append(dataset.tokenizer.decode(all_ids(dataset))[:2])
        except FileNotFoundError:
            outcomes.append("--")
        if finished:
            break
    assert set(outcomes) == {"to", "--", "th"}
    assert outcomes == sorted(outcomes, key=["to", "--", "th"].index)


def start_prepare(*words: str) -> subprocess.Popen:
    """prepare.py on a long text."""
    Path("long.txt").write_text(TEXT * (10**7 // len(TEXT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    command = [ROOT / "prepare.py", "x", "--input=long.txt", *words]
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("seconds", [0.3, 0.7, 1.1])
def test_a_real_kill_leaves_a_whole_dataset_or_none(seconds, texts_here):
    """And the next preparation works."""
    before = content(prepare("x", inputs=("a.txt",)))
    process = start_prepare("--tokenizer=bpe:300", "--overwrite=true")
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=20)
    if Path("data/x/meta.json").exists():
        check_dataset("x")
    assert content(prepare("x", inputs=("a.txt",), overwrite=True)) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_a_stop_while_threads_encode_is_one_line_and_leaves_no_dataset(stop, workplace):
    BPE.save("bpe.json")
    process, ids = start_prepare("--tokenizer=bpe.json"), Path("data/x/.partial/train.bin")
    while not ids.exists() or not ids.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (128 + stop, f"stopped by {stop.name}")
    assert out == "preparing data/x from long.txt\n"
    assert not Path("data").exists()


# ------------------------------------------------------------------------------------------
# Memory


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak there")
def test_a_long_text_needs_no_more_memory_than_a_short_one(workplace):
    """(resource.getrusage would count what the parent process held when it forked.)"""
    BPE.save("bpe.json")
    script = """
from pathlib import Path
from nanolm.runs.prepare import prepare
prepare("x", inputs=("long.txt",), tokenizer="bpe.json")
print(Path("/proc/self/status").read_text())
"""
    peaks = []
    for size in (10**6, 60 * 10**6):
        Path("long.txt").write_text(TEXT * (size // len(TEXT)))
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", run.stdout)[1]) * 1024)
    assert peaks[1] - peaks[0] < size / 2
