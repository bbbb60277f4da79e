"""Laws of classification and tagging."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model, seeds

from nanolm.evaluation import evaluate
from nanolm.layers import ModelConfig
from nanolm.loss import NO_TARGET
from nanolm.tasks import scores
from nanolm.tasks.classification import ClassificationTask
from nanolm.tasks.labelled import usual_scores
from nanolm.tasks.tagging import TaggingTask
from nanolm.text.data import DATA_DIR, Dataset, open_dataset
from nanolm.text.records import Record
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer

WORDS = ["the", "wolf", "met", "a", "fox", "and", "ran", "very", "fast", "into", "dark", "woods"]
BARE = BPETokenizer.train([" ".join(WORDS)] * 3, 270)
MODEL = ModelConfig(vocab_size=270, block_size=16, n_layer=1, n_head=2, n_embd=8, causal=False)
TAGS = ("B-A", "I-A", "O")
KINDS = {ClassificationTask: ("text", ("a", "b")), TaggingTask: ("words", TAGS)}
tasks = pytest.mark.parametrize("kind", KINDS)
shapes = st.sampled_from(
    [
        {},
        {"causal": True},
        {"norm_first": False, "n_types": 2},
    ]
)


def records_of(kind, n: int, seed: int = 0) -> list[Record]:
    """n short texts; each label occurs in them."""
    random = np.random.default_rng(seed)
    names, found = KINDS[kind][1], []
    for i in range(n):
        words = tuple(random.choice(WORDS, size=1 + i % 5).tolist())
        parts = words if kind is TaggingTask else (" ".join(words),)
        labels = tuple(names[(i + j) % len(names)] for j in range(len(parts)))
        found.append(Record(parts, labels, "a", f"line {i}"))
    return found


@pytest.fixture
def dataset(kind, workplace) -> Dataset:
    kind.prepare(DATA_DIR / "x", records_of(kind, 50), records_of(kind, 20, 1), BARE)
    return open_dataset("x")


def task_of(kind, **keys):
    model = replace(MODEL, head=KINDS[kind][0], labels=KINDS[kind][1], **keys)
    known = {f.name: getattr(model, f.name) for f in fields(kind) if hasattr(model, f.name)}
    return kind(**known, batch_size=3, seed=1337, tokenizer=BARE), model


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


@tasks
@given(shapes, seeds)
def test_an_epoch_asks_for_each_label_once(kind, dataset, keys, seed):
    task, n = replace(task_of(kind, **keys)[0], seed=seed), 17
    assert task.batches_per_epoch(dataset) == n
    for epoch in (0, 1):
        batches = [task.batch(dataset, epoch * n + i) for i in range(n)]
        asked = sorted(t for b in batches for t in b["targets"].ravel() if t != NO_TARGET)
        assert asked == sorted(dataset.train.labels[:, 1])
    again = task.batch(dataset, n)
    assert all(
        np.array_equal(batch, again[name]) for name, batch in task.batch(dataset, n).items()
    )


@tasks
@given(shapes, seeds)
def test_a_batch_asks_of_a_text_what_it_asks_of_it_alone(kind, dataset, keys, seed):
    """Whatever fills it up: the labels' logits are those of the text by itself."""
    task, config = task_of(kind, **keys)
    model, numbers = random_model(config, seed), np.arange(seed % 40, seed % 40 + 5)
    batch = tensors(task.gather(dataset.train, numbers))
    targets = batch.pop("targets")
    together = model(**batch)[0]
    for row, i in enumerate(numbers):
        own = tensors(task.gather(dataset.train, numbers[row : row + 1]))
        wanted = own.pop("targets")
        real = int((wanted != NO_TARGET).sum())
        assert torch.equal(targets[row, :real], wanted[0, :real])
        alone = model(**own)[0][0, :real]
        assert torch.allclose(together[row, :real], alone, atol=1e-9), i


@pytest.mark.parametrize("n_words", [1, 3, 30])
def test_each_word_answers_at_its_first_token(n_words):
    record = Record(tuple(WORDS * 3)[:n_words], ("O",) * n_words, "a", "")
    ids, labels = TaggingTask.encode(record, BARE, TAGS)
    assert BARE.decode(ids) == " ".join(record.parts) + "<|endoftext|>"
    for word, (place, _) in zip(record.parts, labels, strict=True):
        assert f"{word} ".startswith(BARE.decode([ids[place]]).strip())
        assert (
            BARE.decode(ids[:place]).split()
            == list(record.parts)[: len(BARE.decode(ids[:place]).split())]
        )


def test_a_word_without_a_label_is_not_asked_for():
    ids, labels = TaggingTask.encode(Record(("a", "fox"), (None, "O"), "", ""), BARE, TAGS)
    assert [number for _, number in labels] == [2]
    assert BARE.decode([ids[labels[0][0]]]).startswith(" f")


@given(shapes, st.integers(1, 60))
def test_a_text_that_is_too_long_is_cut_and_its_end_stays(keys, length):
    task, _ = task_of(ClassificationTask, **keys)
    batch, lengths = task.inputs([list(range(length)) + [BARE.end_of_text]], BARE)
    n = min(16, length + 1)
    assert lengths.tolist() == [n]
    assert batch["ids"][0, :n].tolist() == [*range(n - 1), BARE.end_of_text]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_a_decoder_answers_at_the_last_token_and_bert_at_the_first(lengths):
    rows = [[0] * n for n in lengths]
    for keys, wanted in (
        ({"causal": True}, [[min(n, 16) - 1] for n in lengths]),
        ({"norm_first": False}, [[0] for _ in lengths]),
    ):
        task, _ = task_of(ClassificationTask, **keys)
        assert task.places(task.inputs(rows, BARE)[1])["places"].tolist() == wanted
    task, _ = task_of(ClassificationTask)
    assert task.places(task.inputs(rows, BARE)[1]) == {}  # the mean of all


def test_a_pair_is_two_texts_of_two_types():
    task, _ = task_of(ClassificationTask, norm_first=False, n_types=2)
    ids, _ = ClassificationTask.encode(
        Record(("the fox", "ran"), ("a",), "", ""), BARE, ("a", "b")
    )
    assert BARE.decode(ids) == "the fox<|endoftext|>ran<|endoftext|>"
    batch, _ = task.inputs([ids], BARE)
    border = ids.index(BARE.end_of_text) + 1
    assert batch["types"][0, : len(ids)].tolist() == [0] * border + [1] * (len(ids) - border)


@tasks
@given(seeds)
def test_the_scores_are_those_of_all_guesses_at_once(kind, dataset, seed):
    task, config = task_of(kind)
    model = random_model(config, seed).float()
    batches = list(map(tensors, task.evaluation(dataset, "val")))
    counts = evaluate(model, batches, tally=task.tally)
    named, sentences, surprises = task.score(counts, dataset), [], []
    for batch in batches:
        targets = batch.pop("targets")
        log_p = model(**batch)[0].log_softmax(dim=-1)
        for row, wanted in zip(log_p, targets, strict=True):
            kept = wanted != NO_TARGET
            sentences.append((wanted[kept].tolist(), row[kept].argmax(dim=-1).tolist()))
            surprises += (-row[kept].gather(1, wanted[kept][:, None])).flatten().tolist()
    wanted, found = (np.array([i for pair in sentences for i in pair[k]]) for k in (0, 1))
    matrix = scores.confusion(wanted, found, len(task.labels))
    assert np.array_equal(task.matrix(counts), matrix)
    assert named["loss"] == pytest.approx(np.mean(surprises), rel=1e-5)
    assert named["accuracy"] == pytest.approx((wanted == found).mean())
    assert named["f1/" + task.labels[0]] == scores.label_scores(matrix)[0 + 2][0]
    if kind is TaggingTask:
        tags = [[[task.labels[i] for i in row] for row in pair] for pair in sentences]
        f1 = scores.precision_recall_f1(*sum(scores.span_counts(*pair) for pair in tags))[2]
        assert named["entity_f1"] == pytest.approx(float(f1))
    else:
        assert named["mcc"] == pytest.approx(scores.matthews(matrix))


@tasks
def test_baselines_are_the_scores_of_guesses_without_a_model(kind, dataset):
    found = task_of(kind)[0].baselines(dataset)
    n = len(KINDS[kind][1])
    assert found.pop(f"loss of a blind guess, ln({n})") == pytest.approx(np.log(n))
    labels = [[r.labels for r in records_of(kind, *args)] for args in ((50, 0), (20, 1))]
    train, val = ([label for row in rows for label in row] for rows in labels)
    most = max(dict.fromkeys(train), key=train.count)
    assert found[f"accuracy of {most!r}"] == pytest.approx(val.count(most) / len(val))


def test_the_usual_label_of_a_word_is_a_baseline_of_tagging():
    train = [Record(("a", "b", "a", "a"), ("O", "B-A", "O", "B-A"), "", "")]
    val = [Record(("a", "b", "c"), ("O", "O", "B-A"), "", "")]
    found = usual_scores(train, val, TAGS, unit="word")
    assert found["accuracy of the usual label of each word"] == pytest.approx(1 / 3)


@tasks
def test_an_answer_has_the_likeliest_label_with_its_probability(kind):
    task, config = task_of(kind)
    model = random_model(config, 3).float()
    text = "the wolf ran"
    [pieces] = task.answer(model, BARE, text)
    answer = "".join(pieces)
    parts = tuple(text.split()) if kind is TaggingTask else (text,)
    record = Record(parts, (KINDS[kind][1][0],) * len(parts), "", "")
    ids, labels = kind.encode(record, BARE, KINDS[kind][1])
    places = (
        {} if kind is ClassificationTask else {"places": torch.tensor([[p for p, _ in labels]])}
    )
    p = model(torch.tensor([ids]), **places)[0][0].softmax(dim=-1)
    if kind is TaggingTask:
        assert answer.split("\n") == [
            f"{word}\t{task.labels[row.argmax()]} {row.max():.1%}"
            for word, row in zip(parts, p, strict=True)
        ]
    else:
        assert answer.startswith(f"{task.labels[p[0].argmax()]} {p[0].max():.1%}")


@tasks
def test_a_dataset_remembers_its_labels_and_where_it_is_from(kind, dataset):
    assert dataset.meta["task"] == kind.reads
    assert kind.fit(dataset)[1] == {
        "vocab_size": BARE.vocab_size,
        "head": KINDS[kind][0],
        "labels": KINDS[kind][1],
    }
    assert json.loads(Path("data/x/meta.json").read_text())["train"]["examples"] == 50


@tasks
def test_a_model_says_all_that_a_task_needs_for_single_texts(kind):
    task, config = task_of(kind)
    for field in fields(kind):
        if hasattr(config, field.name):
            assert getattr(task, field.name) == getattr(config, field.name)


def test_characters_need_no_token_that_ends_a_text():
    record = Record(("ab",), ("x",), "", "")
    assert ClassificationTask.encode(record, CharTokenizer("ab"), ("x",)) == ([0, 1], [(0, 0)])
