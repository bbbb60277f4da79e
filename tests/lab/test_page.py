"""The page in a real browser: clicked through as a reader would, by mouse and by keyboard."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TASKS, TINY
from strategies import random_model

from nanolm.lab.look import look, page
from nanolm.layers import ModelConfig
from nanolm.runs.load import Trained, load_model
from nanolm.runs.settings import TrainConfig
from nanolm.tasks.table import make_task
from nanolm.text.char_tokenizer import CharTokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        words = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=words)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """opened(data) -> a browser's page of it. It needs nothing else, and makes no errors."""
    wrong, context = [], browser.new_context(color_scheme="light")
    tab = context.new_page()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    asked = []
    tab.on("request", lambda request: asked.append(request.url))

    def open_page(data: dict) -> Any:
        file = tmp_path / "index.html"
        file.write_text(page(data))
        tab.goto(file.as_uri())
        assert asked == [file.as_uri()]
        return tab

    yield open_page
    context.close()
    assert not wrong


def data_of(name: str, text: str, answer: str | None = None) -> dict:
    """The data as the page reads it."""
    return json.loads(json.dumps(look(load_model(name), text, answer)))


def background(tab: Any, selector: str) -> str:
    """The colour behind the first of these elements."""
    return tab.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundColor")


def test_a_reader_clicks_through_the_page(opened, tiny_run):
    data = data_of("out/tiny", "1 little")
    text, tab = data["texts"]["text"], opened(data)
    tokens = tab.locator("#strip-text .token")
    assert tokens.all_inner_texts() == [*"1 little", "what comes next"]
    tokens.nth(3).click()
    assert f"surprise {text['surprise'][3]:.4f} nats" in tab.locator("#token").inner_text()
    assert tab.locator("#token .guess").count() == len(text["guesses"][3])
    assert tab.locator("#layers tr").count() == 1 + len(text["lens"])
    tab.keyboard.press("ArrowRight")
    assert f"surprise {text['surprise'][4]:.4f} nats" in tab.locator("#token").inner_text()
    tab.locator(".head").nth(1).click()
    assert "head 2" in tab.locator("#maptitle").inner_text()
    tab.keyboard.press("ArrowLeft")
    assert "head 1" in tab.locator("#maptitle").inner_text()
    assert tab.locator("#strips path").count() == data["attention"]["text"]["shape"][-1]
    tokens.last.click()
    assert "What comes next" in tab.locator("#token").inner_text()
    assert tab.locator("#strips path").count() == 0


def test_the_map_is_what_the_head_does(opened, tiny_run):
    """Nothing is drawn above the diagonal, and the pointer reads a weight of 1 at the first."""
    tab = opened(data_of("out/tiny", "1 little"))
    drawn = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = tab.locator("#map").evaluate(drawn)
    opacity = [pixels[4 * i + 3] for i in range(64)]
    assert opacity[0] == 255
    assert not any(opacity[8 * row + column] for row in range(8) for column in range(row + 1, 8))
    tab.locator("#map").hover(position={"x": 3, "y": 3})
    assert tab.locator("#pointed").inner_text() == '"1" at "1": 100.0%'


def test_light_and_dark(opened, tiny_run):
    tab = opened(data_of("out/tiny", "1 little"))
    light = background(tab, "body")
    tab.locator("#theme").click()
    assert background(tab, "body") != light
    tab.locator("#theme").click()
    assert background(tab, "body") == light


def test_colours_show_what_is_chosen(opened, tiny_run):
    tab = opened(data_of("out/tiny", "1 little"))
    seen = set()
    for colour in ("surprise", "attention", "none"):
        tab.locator("#colour").select_option(colour)
        seen.add(background(tab, "#strip-text .token >> nth=2"))
    assert len(seen) == 3


def test_an_answer_looks_across_at_its_source(opened, tiny_run, run_main):
    flags = [*TINY, *TASKS["seq2seq"], "--out_dir=out/it"]
    assert run_main("train", *flags)[0] == 0
    tab = opened(data_of("out/it", "1+2", "3"))
    tab.locator("#kind").select_option("cross")
    assert "the text at the source" in tab.locator("#maptitle").inner_text()
    tab.locator("#strip-source .token").first.click()
    assert "the source at itself" in tab.locator("#maptitle").inner_text()


@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_labels_and_what_they_rest_on_are_shown(task, opened, tiny_run, run_main):
    flags = [*TINY, *TASKS[task], "--out_dir=out/it"]
    assert run_main("train", *flags)[0] == 0
    data = data_of("out/it", "3 and foxes")
    tab, text = opened(data), data["texts"]["text"]
    best = max(zip(text["probabilities"][0], text["labels"], strict=True))[1]
    assert tab.locator("#labels .guess").first.inner_text().startswith(best)
    assert background(tab, ".token") != "rgba(0, 0, 0, 0)"


def test_a_thousand_tokens_fit(opened):
    """Into five megabytes, of a model as large as the smallest GPT-2 in layers and heads."""
    tokenizer = CharTokenizer(map(chr, range(97, 123)))
    shape = ModelConfig(
        vocab_size=26, block_size=1000, n_layer=12, n_head=12, n_embd=48, n_hidden=48
    )
    task = make_task(TrainConfig(vocab_size=26), tokenizer)
    trained = Trained(random_model(shape, 0).float(), tokenizer, "a large one", task)
    data = json.loads(json.dumps(look(trained, "abcdefghijklmnopqrstuvwxy" * 40)))
    assert len(page(data).encode()) <= 5_000_000
    tab = opened(data)
    assert tab.locator("#strip-text .token").count() == 1001
    tab.locator("#strip-text .token").nth(777).click()
    assert "Token 778" in tab.locator("#token").inner_text()
    assert Path(tab.url.removeprefix("file://")).stat().st_size <= 5_000_000
