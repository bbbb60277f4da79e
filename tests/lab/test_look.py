"""Laws of the page that looks inside a model: it says what the model does."""

import base64
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASKS, TINY
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, torch_seeded

from nanolm.lab import look as module
from nanolm.lab.look import LINKS, MAPS, in_base64, look, main, merges_of, packed, page, spelled
from nanolm.loss import cross_entropy
from nanolm.runs.load import load_model
from nanolm.runs.prepare import prepare
from nanolm.text.bpe_tokenizer import BPETokenizer
from nanolm.text.tokenizer import load_tokenizer

TEXTS = {"classification": "3 and 3 wolfs", "tagging": "the fox Mary", "completion": "1+2"}


def data_of(written: str) -> dict:
    """What stands in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', written, re.DOTALL)[1])


@pytest.mark.parametrize("task", ["causal", *TASKS])
def test_a_page_is_made_of_every_task(task, tiny_run, run_main):
    """With pictures; and its labels, or guesses, are those that sample.py prints."""
    text = TEXTS.get(task, "1 little wolf") + "<|mask|>" * (task == "masked")
    keys = TASKS.get(task, [])
    assert run_main("train", *TINY, *keys, "--out_dir=out/it", "--overwrite=true")[0] == 0
    main(["--out_dir=out/it", f"--text={text}"])
    data = data_of(Path("look/index.html").read_text())
    shown = data["texts"]["text"]
    assert data["title"].startswith("out/it, step ")
    pictures = {path.name for path in Path("look").glob("*.png")}
    assert "attention-text.png" in pictures
    assert ("surprise.png" in pictures) == ("surprise" in shown)
    words = ["--out_dir=out/it", f"--start={text}", "--dtype=float32"]
    _, out, _ = run_main("sample", *words, "--max_new_tokens=9", "--temperature=0")
    if task in ("classification", "tagging"):
        for p in shown["probabilities"]:
            best = int(np.argmax(p))
            shares = re.findall(rf"{shown['labels'][best]} ([\d.]+)%", out)
            assert any(abs(float(share) - 100 * p[best]) < 0.06 for share in shares)
        assert len(shown["shares"]) == len(shown["probabilities"])
    elif task == "masked":
        place = next(i for i, nats in enumerate(shown["surprise"]) if nats is None)
        token, p = shown["guesses"][place][0]
        assert f"{data['vocabulary'][str(token)][0]!r} {p:.1%}" in out
    else:
        rows = zip(shown["ids"], shown["guesses"], strict=False)
        written = [i for i, best in rows if best and best[0][0] == i]
        assert written or task == "causal"  # an answer is the model's own, the likeliest tokens
        assert len(shown["guesses"]) == len(shown["ids"]) + 1  # and what comes next


def test_the_surprise_of_a_text_is_its_loss(tiny_run):
    trained = load_model("out/tiny")
    data = look(trained, "1 little")
    text = data["texts"]["text"]
    ids = torch.tensor([text["ids"]])
    logits, _ = trained.model(ids[:, :-1])
    assert text["surprise"][0] is None
    found = np.mean(text["surprise"][1:])
    assert found == pytest.approx(cross_entropy(logits, ids[:, 1:]).item(), abs=1e-4)
    assert trained.tokenizer.decode(text["ids"]) == "1 little"


def test_a_folder_of_hugging_face_s_is_looked_at_alike(tiny_run, run_main):
    """With the merges that its tokenizer.json tells."""
    prepare("words", inputs=("text.txt",), tokenizer="bpe:280")
    assert run_main("train", *TINY, "--dataset=words", "--out_dir=out/it")[0] == 0
    assert run_main("nanolm/runs/export", "out/it", "there")[0] == 0
    ours, theirs = (look(load_model(name), "1 little wolf") for name in ("out/it", "there"))
    assert ours["texts"]["text"]["ids"] == theirs["texts"]["text"]["ids"]
    surprises = (np.array(each["texts"]["text"]["surprise"][1:-1]) for each in (ours, theirs))
    np.testing.assert_allclose(*surprises, atol=2e-4)
    assert ours["attention"] == theirs["attention"]
    ids = ours["texts"]["text"]["ids"]
    steps = [[[*map(len, each["vocabulary"][i][2])] for i in ids] for each in (ours, theirs)]
    assert steps[0] == steps[1]
    assert max(map(len, steps[0])) > 1


def test_an_answer_that_is_given_is_looked_at(tiny_run, run_main):
    flags = [*TINY, *TASKS["seq2seq"], "--out_dir=out/it"]
    assert run_main("train", *flags)[0] == 0
    trained = load_model("out/it")
    texts = look(trained, "1+2", "3")["texts"]
    assert trained.tokenizer.decode(texts["text"]["ids"][1:]) == "3"
    assert trained.tokenizer.decode(texts["source"]["ids"]).startswith("1+2")
    with pytest.raises(ValueError, match=r"answer='3': this model was not trained to answer"):
        look(load_model("out/tiny"), "1", "3")


def test_a_question_that_leaves_no_room_for_an_answer_is_shown_alone(tiny_run, run_main):
    flags = [*TINY, *TASKS["completion"], "--out_dir=out/it"]
    assert run_main("train", *flags)[0] == 0
    trained = load_model("out/it")
    assert len(look(trained, "1+2+3+4+5+6")["texts"]["text"]["ids"]) == 8


def test_a_sentence_without_words_has_no_labels(tiny_run, run_main):
    flags = [*TINY, *TASKS["tagging"], "--out_dir=out/it"]
    assert run_main("train", *flags)[0] == 0
    with pytest.raises(ValueError, match="text=' ': there is no word in it"):
        look(load_model("out/it"), " ")


def test_a_text_that_is_too_long_is_cut_and_that_is_said(tiny_run, capsys):
    data = look(load_model("out/tiny"), "1 little wolf and 2 more wolves")
    assert len(data["texts"]["text"]["ids"]) == 8
    assert "tokens, of which only the first 8 (block_size) fit" in capsys.readouterr().out


def test_pictures_of_another_model_do_not_stay(tiny_run):
    main(["--text=1"])
    Path("look/shares.png").touch()
    Path("look/mine.png").touch()
    main(["--text=1"])
    assert not Path("look/shares.png").exists()
    assert Path("look/mine.png").exists()  # of someone else
    assert Path("look/surprise.png").exists()


def test_a_special_token_has_no_bytes(tiny_run):
    prepare("words", inputs=("text.txt",), tokenizer="bpe:280")
    tokenizer = load_tokenizer("data/words")
    assert spelled(tokenizer.end_of_text, tokenizer, steps=True) == ["<|endoftext|>", "", []]
    assert spelled(65, tokenizer, steps=True) == ["A", "41", [["A"]]]


# ------------------------------------------------------------------------------------------
# What is packed into it


def unpacked(text: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@given(seeds, st.integers(1, 3), st.sampled_from([(1, 1), (3, 7), (11, 11)]))
def test_packed_weights_are_the_weights_to_their_255th(seed, n_layer, size):
    random = [torch.randn(5, *size, generator=torch_seeded(seed + i)) for i in range(n_layer)]
    layers = [x.softmax(dim=-1) for x in random]
    found, K = packed(layers), min(LINKS, size[1])
    assert found["shape"] == [n_layer, 5, *size, K]
    assert found["step"] == 1
    exact = torch.stack(layers).numpy()
    maps = unpacked(found["map"], exact.shape, np.uint8) / 255
    np.testing.assert_allclose(maps, exact, atol=0.5 / 255 + 1e-6)
    keys = unpacked(found["keys"], (n_layer, 5, size[0], K), np.uint16)
    weights = unpacked(found["weights"], keys.shape, np.uint8) / 255
    best = np.take_along_axis(exact, keys.astype(int), axis=-1)
    np.testing.assert_allclose(weights, best, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(best, -np.sort(-exact)[..., :K])


def test_large_maps_are_made_coarser_and_keep_what_is_large(monkeypatch):
    monkeypatch.setattr(module, "MAPS", 40)
    weights = torch.zeros(2, 11, 11)
    weights[1, 10, 7] = 1.0
    found = packed([weights])
    side = math.ceil(11 / found["step"])
    assert 2 * (11 / found["step"]) ** 2 <= 40 < MAPS
    maps = unpacked(found["map"], (1, 2, side, side), np.uint8)
    assert maps[0, 1, 10 // found["step"], 7 // found["step"]] == 255
    assert maps.sum() == 255


@given(st.text(max_size=20))
def test_merges_lead_from_bytes_to_the_token(text):
    tokenizer = BPETokenizer.train([text * 5, "the theme of the thesis"] * 2, 262)
    for i in tokenizer.encode(text):
        steps = [*merges_of(i, tokenizer)]
        assert len(steps[0]) == len(tokenizer.decode_bytes([i]))
        assert len(steps[-1]) == 1
        for before, after in pairwise(steps):
            assert len(after) < len(before)


def test_a_text_cannot_leave_its_place_in_the_page(tiny_run):
    """</script> in a text would end the data, and what follows would be run."""
    written = page({"title": "</script><script>alert(1)</script>"})
    assert data_of(written) == {"title": "</script><script>alert(1)</script>"}
    assert written.count("</script>") == 2


def test_bytes_are_written_in_order():
    assert base64.b64decode(in_base64([torch.tensor([1, 258], dtype=torch.int16)])) == b"\1\0\2\1"


# ------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "text: say what the model is to read"),
        (["--text=a", "--folder=data"], "folder='data': holds other things"),
        (["--text="], "text='': there is no text"),
        (["--text=FILE:none.txt"], "text='FILE:none.txt': there is no such file"),
        (["--text=a", "--out_dir=out/none"], "'out/none' is neither a folder here"),
        (["--text=a", "--out_dir=data/tiny"], "data/tiny holds no model"),
        (["--text=a", "--folder=text.txt"], "folder='text.txt': cannot be written"),
        (["--text=é"], "character 'é' (U+00E9), at position 0, is not in"),
    ],
    ids=str,
)
def test_what_cannot_be_looked_at_is_one_line(words, message, tiny_run):
    Path("text.txt").write_text("a")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        main(words)
