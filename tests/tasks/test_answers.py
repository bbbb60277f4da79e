"""Laws of completion and seq2seq: what is learned of an example, batches, and answers."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_model, seeds

from nanolm.evaluation import evaluate, loss_counts
from nanolm.layers import POSITIONS, ModelConfig
from nanolm.loss import NO_TARGET
from nanolm.tasks.answering import AnsweringTask, repeated_scores, stop_ids
from nanolm.tasks.completion import CompletionTask
from nanolm.tasks.examples import grouped
from nanolm.tasks.scores import text_counts, text_scores
from nanolm.tasks.seq2seq import Seq2SeqTask
from nanolm.text.conversations import ENDS, PAIR, exchange_ids
from nanolm.text.data import DATA_DIR, Dataset, open_dataset
from nanolm.text.records import Record
from nanolm.text.tokenizer import BPETokenizer
from nanolm.training import TrainState, update

WORDS = ["the", "wolf", "met", "a", "fox", "and", "ran", "very", "fast", "into", "dark", "woods"]
BARE = BPETokenizer.train([" ".join(WORDS), "user\nassistant\n"] * 3, 320)
FEW = settings(max_examples=20)
BLOCK_SIZE = 48
SHAPE = {"block_size": BLOCK_SIZE, "n_layer": 2, "n_head": 2, "n_embd": 8}
FORMS = {"pairs": PAIR, "chats": ("user", "assistant", "user", "assistant")}
forms = pytest.mark.parametrize("form", FORMS)
tasks = pytest.mark.parametrize("kind", [CompletionTask, Seq2SeqTask])
every_position = pytest.mark.parametrize("position", POSITIONS)


def records_of(form: str, n: int, seed: int = 0) -> list[Record]:
    """n examples of texts of 1 to 4 words; two are alike."""
    random, roles = np.random.default_rng(seed), FORMS[form]
    lengths = random.integers(1, 5, size=(n, len(roles)))
    parts = [tuple(" ".join(random.choice(WORDS, size=k)) for k in row) for row in lengths]
    return [Record(own, roles, "a", f"line {i}") for i, own in enumerate([*parts[1:], parts[1]])]


def prepared(train: list[Record], val: list[Record], name: str = "x") -> Dataset:
    AnsweringTask.prepare(DATA_DIR / name, train, val, BARE)
    return open_dataset(name)


@pytest.fixture
def dataset(form, workplace) -> Dataset:
    return prepared(records_of(form, 23), records_of(form, 11, 1))


def task_of(kind, dataset: Dataset, **keys):
    """A task for the dataset, and the shape of a model for it."""
    wanted = kind.fit(dataset)[1] | ({"n_encoder_layer": 1} if kind is Seq2SeqTask else {})
    keys = {"batch_size": 3, "seed": 1, "block_size": BLOCK_SIZE} | keys
    keys |= {"vocab_size": wanted["vocab_size"], "chat": wanted.pop("chat")}
    if kind is Seq2SeqTask:
        keys |= {"start_id": wanted["start_id"]}
    model = ModelConfig(**SHAPE | wanted | {"block_size": keys["block_size"]})
    return kind(tokenizer=dataset.tokenizer, **keys), model


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def epoch_of(task, dataset: Dataset, number: int = 0) -> list[dict]:
    n = task.batches_per_epoch(dataset)
    return [task.batch(dataset, number * n + i) for i in range(n)]


def examples_in(batch: dict) -> list[tuple[list[int], list[int]]]:
    """The ids and the targets of each example of a batch of completion."""
    return [
        tuple(batch[name][row][segments == number].tolist() for name in ("ids", "targets"))
        for row, segments in enumerate(batch["segments"])
        for number in range(1, segments.max() + 1)
    ]


def surprise(model, batches) -> tuple[float, int]:
    """The summed loss of batches, and how many targets they have."""
    with torch.no_grad():
        total, n = sum(loss_counts(model, tensors(batch)) for batch in batches).tolist()
    return total, int(n)


# ------------------------------------------------------------------------------------------
# Batches


@forms
@pytest.mark.parametrize("pack", [True, False])
@FEW
@given(seed=seeds, block_size=st.sampled_from([41, 48, 100]), batch_size=st.integers(1, 4))
def test_an_epoch_has_each_example_once_and_asks_for_the_answers_alone(
    dataset, form, pack, seed, block_size, batch_size
):
    """At each place for the next id, and never for one of the prompt."""
    keys = {"seed": seed, "block_size": block_size, "batch_size": batch_size, "pack": pack}
    task, wanted = task_of(CompletionTask, dataset, **keys)[0], []
    for record in records_of(form, 23):
        ids, _ = exchange_ids(record, dataset.tokenizer)
        learned = [part for part, role in zip(*record[:2], strict=True) if role in "assistant"]
        end = ENDS if form == "chats" else "<|endoftext|>"
        answers = [record.parts[1]] if form == "pairs" else learned
        wanted.append((ids[:-1], "".join(text + end for text in answers)))
    for number in (0, 1):
        found = []
        for batch in epoch_of(task, dataset, number):
            assert batch["ids"].shape == batch["targets"].shape == batch["segments"].shape
            assert batch["ids"].shape[0] <= batch_size
            assert batch["ids"].shape[1] <= block_size
            outside = batch["segments"] == 0
            assert (batch["targets"][outside] == NO_TARGET).all()
            for ids, targets in examples_in(batch):
                follows = [*ids[1:], None]
                asked = [t for t, i in enumerate(targets) if i != NO_TARGET]
                assert all(targets[t] == follows[t] for t in asked if follows[t] is not None)
                found.append((ids, dataset.tokenizer.decode([targets[t] for t in asked])))
        assert sorted(found) == sorted(wanted)


@tasks
@forms
def test_a_batch_depends_on_its_number_and_the_seed_alone(kind, form, dataset):
    batches = epoch_of(task_of(kind, dataset)[0], dataset, 1)
    grouped.cache_clear()
    again = epoch_of(task_of(kind, dataset)[0], dataset, 1)
    others = epoch_of(task_of(kind, dataset, seed=2)[0], dataset, 1)
    for batch, same in zip(batches, again, strict=True):
        assert all(np.array_equal(batch[name], same[name]) for name in batch)
    assert any(
        not np.array_equal(batch["ids"], other["ids"])
        for batch, other in zip(batches, others, strict=False)
    )


@forms
def test_the_first_target_of_a_pair_stands_at_its_border_and_the_last_is_the_end(form, dataset):
    task = task_of(CompletionTask, dataset)[0]
    end = BARE.end_of_text if form == "pairs" else dataset.tokenizer.special_tokens[ENDS]
    border = BARE.encode("\n")[0]
    for batch in epoch_of(task, dataset):
        for ids, targets in examples_in(batch):
            asked = [t for t, i in enumerate(targets) if i != NO_TARGET]
            assert ids[asked[0]] == border  # also the line of a role ends so
            assert targets[asked[-1]] == end


@forms
@every_position
@FEW
@given(seed=seeds)
def test_a_packed_example_gets_the_logits_that_it_gets_alone(dataset, form, position, seed):
    task, config = task_of(CompletionTask, dataset, seed=seed, block_size=120)
    model = random_model(replace(config, position=position), seed)
    batch = tensors(task.batch(dataset, seed % 3))
    assert batch["segments"].max() > 1
    together = model(**{name: batch[name] for name in ("ids", "segments")})[0]
    for row, segments in enumerate(batch["segments"]):
        for number in range(1, segments.max() + 1):
            own = segments == number
            alone = model(batch["ids"][row][own][None])[0][0]
            assert torch.allclose(together[row][own], alone, atol=1e-9)


@forms
@every_position
def test_packed_and_padded_rows_have_the_same_losses(form, position, dataset):
    task, config = task_of(CompletionTask, dataset)
    model = random_model(replace(config, position=position), 5)
    packed, padded = (
        surprise(model, epoch_of(replace(task, pack=pack), dataset)) for pack in (True, False)
    )
    alone = surprise(model, [task.gather(dataset.train, [[i]]) for i in range(23)])
    assert packed == pytest.approx(padded)
    assert packed == pytest.approx(alone)


@forms
@FEW
@given(seed=seeds, batch_tokens=st.sampled_from([1, 30, 64, 150, 5000]))
def test_batches_of_pairs_have_a_number_of_tokens_or_are_one_example(
    dataset, form, seed, batch_tokens
):
    task = task_of(Seq2SeqTask, dataset, seed=seed, batch_tokens=batch_tokens)[0]
    for epoch in (0, 1):
        groups = task.groups(dataset.train, epoch)
        assert sorted(np.concatenate(groups).tolist()) == list(range(23))
        for group in groups:
            batch = task.gather(dataset.train, group)
            lengths = batch["source_mask"].sum(axis=1), (batch["targets"] >= 0).sum(axis=1)
            size = len(group) * sum(map(max, lengths))  # filled up, but for the multiple of 8
            assert size <= batch_tokens or len(group) == 1
            assert task.n_tokens(batch) == sum(map(sum, lengths))
    if batch_tokens == 5000:
        assert len(groups) == 1


@forms
@pytest.mark.parametrize("batch_tokens", [0, 100])
def test_a_pair_is_a_source_with_its_end_and_an_answer_that_begins_with_the_start(
    form, batch_tokens, dataset
):
    task, found = task_of(Seq2SeqTask, dataset, batch_tokens=batch_tokens)[0], []
    for batch in epoch_of(task, dataset):
        for row in range(len(batch["ids"])):
            source = batch["source"][row][batch["source_mask"][row]].tolist()
            asked = batch["targets"][row] != NO_TARGET
            ids, targets = (batch[name][row][asked].tolist() for name in ("ids", "targets"))
            assert ids == [task.start_id, *targets[:-1]]
            assert not asked[len(ids) :].any()
            found.append((source, targets))
    wanted = []
    for record in records_of(form, 23):
        ids, spans = exchange_ids(record, dataset.tokenizer)
        begin, end = spans[-1]  # of several answers, the last one
        source = BARE.encode(record.parts[0]) if form == "pairs" else ids[:begin]
        wanted.append(([*source, BARE.end_of_text], ids[begin:end]))
    assert sorted(found) == sorted(wanted)


@tasks
@forms
def test_no_example_of_a_batch_changes_the_loss_of_another(kind, form, dataset):
    """Whatever fills it up."""
    task, config = task_of(kind, dataset, batch_size=7)
    model = random_model(config, 3)
    alone = replace(task, batch_size=1)
    together, one_by_one = (
        surprise(model, epoch_of(own, dataset))
        for own in (task, replace(alone, **not_packed(kind)))
    )
    assert together == pytest.approx(one_by_one)


def not_packed(kind) -> dict:
    return {"pack": False} if kind is CompletionTask else {}


# ------------------------------------------------------------------------------------------
# What is too long


@tasks
@pytest.mark.parametrize("longer", ["prompt", "completion"])
def test_an_example_that_is_longer_than_the_context_is_left_out_and_counted(
    kind, longer, workplace
):
    """One more token is one too many."""
    train, val = records_of("pairs", 9), records_of("pairs", 5, 1)
    room = 60
    fits = room - 1  # with the end of the source, or of the answer
    if kind is CompletionTask:  # with the other text and the border; the last token is not read
        fits = room - 2
    for length, n in ((fits, 10), (fits + 1, 9)):
        parts = {"prompt": "\0", "completion": "\0"} | {longer: "\0" * length}
        added = Record(tuple(parts.values()), PAIR, "", "")
        dataset = prepared([*train[:3], added, *train[3:]], val, f"x{n}")
        task = task_of(kind, dataset, block_size=room)[0]
        used = [
            i for group in task.groups(dataset.train, 0) for row in group for i in np.ravel(row)
        ]
        assert sorted(used) == [i for i in range(10) if n == 10 or i != 3]
        facts = task.facts(dataset)
        assert facts[0] == "10 examples for training, 5 for validation"
        left = [line for line in facts if "longer" in line]
        told = [f"1 of them are longer than {room} tokens, and left out"] if n == 9 else []
        assert left == told


@tasks
@forms
def test_where_all_examples_are_too_long_a_larger_context_is_asked_for(kind, form, dataset):
    task = task_of(kind, dataset, block_size=2)[0]
    with pytest.raises(ValueError, match=r"block_size=2: all 23 examples .* as \d+") as error:
        task.batch(dataset, 0)
    size = int(re.search(r"one, as (\d+),", str(error.value))[1])
    assert len(task_of(kind, dataset, block_size=size)[0].fitting(dataset.train)) == 23


# ------------------------------------------------------------------------------------------
# Updates


def seeded_model(config, seed: int):
    """A model with the same weights each time."""
    torch.manual_seed(seed)
    return random_model(config, seed)


def trained(config, micro_batches, seed: int = 5) -> tuple[float, torch.Tensor]:
    """The loss of an update, and all weights after it: they have moved by the gradient."""
    model = seeded_model(config, seed).train()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0))
    loss, _, _ = update(state, micro_batches, learning_rate=1.0, grad_clip=0.0)
    return loss, torch.cat([p.detach().flatten() for p in model.parameters()])


@tasks
@forms
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@FEW
@given(cuts=st.lists(st.integers(1, 8), max_size=4), order=st.permutations(range(9)))
def test_an_update_does_not_depend_on_how_its_batch_is_cut(
    dataset, kind, form, smoothing, cuts, order
):
    """Answers are of different lengths: each target counts the same, and not each micro-batch."""
    task, config = task_of(kind, dataset)
    config = replace(config, label_smoothing=smoothing)
    group = [[i] for i in order] if kind is CompletionTask else list(order)
    places = [0, *sorted(set(cuts)), 9]
    parts = [group[a:b] for a, b in pairwise(places)]
    one = trained(config, [task.gather(dataset.train, group)])
    several = trained(config, [task.gather(dataset.train, part) for part in parts])
    assert several[0] == pytest.approx(one[0])
    assert torch.allclose(several[1], one[1], atol=1e-12)


@tasks
@forms
def test_the_loss_of_an_update_is_the_mean_over_all_targets(kind, form, dataset):
    task, config = task_of(kind, dataset)
    batches = epoch_of(task, dataset)
    model, losses = seeded_model(config, 5), []
    for batch in map(tensors, batches):
        targets = batch.pop("targets")
        log_p = model(**batch)[0].log_softmax(dim=-1)
        losses += [-log_p[b, t, targets[b, t]] for b, t in (targets != NO_TARGET).nonzero()]
    mean = torch.stack(losses).mean()
    mean.backward()
    moved = [p.detach() - p.grad for p in model.parameters()]
    loss, weights = trained(config, batches)
    assert loss == pytest.approx(mean.item())
    assert torch.allclose(weights, torch.cat([p.flatten() for p in moved]), atol=1e-12)


@tasks
@forms
def test_a_micro_batch_without_targets_changes_nothing(kind, form, dataset):
    task, config = task_of(kind, dataset)
    batch = task.batch(dataset, 0)
    empty = batch | {"targets": np.full_like(batch["targets"], NO_TARGET)}
    before = torch.cat([p.detach().flatten() for p in seeded_model(config, 5).parameters()])
    loss, after = trained(config, [empty])
    assert loss == 0
    assert torch.equal(before, after)
    alone, both = trained(config, [batch]), trained(config, [empty, batch, empty])
    assert both[0] == pytest.approx(alone[0])
    assert torch.allclose(both[1], alone[1], atol=1e-12)


# ------------------------------------------------------------------------------------------
# Answers


def talkative(config, seed: int, ends: list[int]):
    """A random model that ends some of its answers."""
    model = random_model(config, seed)
    model.tokens.weight.data[ends] *= 3
    return model


@torch.no_grad()
def greedy(model, ids: list[int], limit: int, stop: list[int], **context) -> list[int]:
    """The likeliest token each time, read from the beginning each time."""
    found = []
    while len(found) < limit:
        logits = model(torch.tensor([ids + found]), **context)[0]
        if (token := int(logits[0, -1].argmax())) in stop:
            break
        found.append(token)
    return found


def answered(task, dataset: Dataset, model, record: Record, limit: int) -> str:
    """The twin of write, for the text of one record."""
    ids, spans = exchange_ids(record, dataset.tokenizer)
    asked, stop = ids[: spans[-1][0]], stop_ids(dataset.tokenizer)
    if isinstance(task, Seq2SeqTask):
        n = 0 if task.chat else len(BARE.encode("\n"))
        source = torch.tensor([[*asked[: len(asked) - n], BARE.end_of_text]])
        found = greedy(model, [task.start_id], min(limit, BLOCK_SIZE), stop, source=source)
    else:
        found = greedy(model, asked, min(limit, BLOCK_SIZE + 1 - len(asked)), stop)
    special = dataset.tokenizer.special_tokens.values()
    return dataset.tokenizer.decode([i for i in found if i not in special]).strip()


@tasks
@forms
@FEW
@given(seed=seeds)
def test_answers_are_the_likeliest_tokens_and_score_as_their_texts_do(dataset, kind, form, seed):
    """Side by side with longer and shorter ones, and with a cache, as alone and without."""
    task, config = task_of(kind, dataset, eval_answers=7)
    model = talkative(config, seed, stop_ids(dataset.tokenizer))
    batches = list(map(tensors, task.evaluation(dataset, "val")))
    asked = [batch for batch in batches if "asked" in batch]
    records, counts = records_of(form, 11, 1), []
    for batch in asked:
        longest = task.begin(model, batch["asked"])[0].shape[1]  # says how much room there is
        limit = min(2 * batch["targets"].shape[1], task.block_size - longest + 1)
        for text in task.write(model, batch):
            record = records[len(counts)]
            assert text == answered(task, dataset, model, record, limit)
            counts.append(text_counts(text, record.parts[-1]))
    assert len(counts) == 7
    total, n = surprise(model, epoch_of(task, replace(dataset, train=dataset.val)))
    scores = task.score(evaluate(model, batches, tally=task.tally), dataset)
    assert scores.pop("loss") == pytest.approx(total / n)
    assert scores.pop("perplexity") == pytest.approx(np.exp(total / n))
    assert scores == pytest.approx(text_scores(sum(counts)))


@tasks
@forms
def test_without_answers_there_is_a_loss_alone(kind, form, dataset):
    task, config = task_of(kind, dataset)
    batches = list(map(tensors, task.evaluation(dataset, "val")))
    assert len(batches) == task.evaluation_size(dataset)
    counts = evaluate(random_model(config, 1), batches, tally=task.tally)
    assert task.score(counts, dataset).keys() == {"loss", "perplexity"}


@tasks
def test_an_answer_that_is_shared_among_processes_without_targets_counts_for_none(kind, workplace):
    dataset = prepared(records_of("pairs", 9), records_of("pairs", 5, 1))
    task, config = task_of(kind, dataset)
    batch = tensors(task.questions(dataset.val, [0]))
    batch["targets"] = torch.full_like(batch["targets"], NO_TARGET)
    assert not task.tally(random_model(config, 1), batch).any()


@tasks
@forms
def test_a_text_is_asked_as_it_stands_in_training(kind, form, dataset):
    """And the answer to it is the same, whether a person asks or an evaluation."""
    task, config = task_of(kind, dataset)
    model = talkative(config, 2, stop_ids(dataset.tokenizer))
    for text in (record.parts[0] for record in records_of(form, 6)):
        roles = PAIR if form == "pairs" else ("user", "assistant")
        record = Record((text, "fox"), roles, "", "")
        ids, spans = exchange_ids(record, dataset.tokenizer)
        if kind is CompletionTask:
            assert task.question(text, dataset.tokenizer) == ids[: spans[0][0]]
        options = {"max_new_tokens": 20, "temperature": 0.0}
        [pieces] = task.answer(model, dataset.tokenizer, text, **options)
        wanted = answered(task, dataset, model, record, 20)
        special = dataset.tokenizer.special_tokens
        found = "".join(pieces)
        for name in special:
            found = found.replace(name, "")
        assert found.strip() == wanted


@tasks
def test_a_text_that_leaves_no_room_for_an_answer_is_refused(kind, workplace):
    dataset = prepared(records_of("pairs", 9), records_of("pairs", 5, 1))
    task, config = task_of(kind, dataset)
    with pytest.raises(
        ValueError, match=rf"the text has {BLOCK_SIZE + 1} tokens: .* room for {BLOCK_SIZE} "
    ):
        task.answer(random_model(config, 0), BARE, "\0" * BLOCK_SIZE, max_new_tokens=5)


def test_a_prompt_that_fills_the_context_has_one_token_left_for_its_answer(workplace):
    """Where the right answer is none, as SQuAD 2 has them, an evaluation failed here."""
    empty = Record(("\0" * (BLOCK_SIZE - 1), ""), PAIR, "", "")
    dataset = prepared(records_of("pairs", 9), [empty])
    task, config = task_of(CompletionTask, dataset, eval_answers=1)
    batch = tensors(task.questions(dataset.val, [0]))
    assert batch["asked"].shape[1] == BLOCK_SIZE
    model = random_model(config, 0)
    limit = 2 * batch["targets"].shape[1]
    assert task.write(model, batch) == [answered(task, dataset, model, empty, limit)]


@tasks
@forms
def test_what_is_shown_are_texts_with_the_models_answers_and_the_given_ones(kind, form, dataset):
    task, config = task_of(kind, dataset)
    model = talkative(config, 4, stop_ids(dataset.tokenizer))
    title, pieces = task.show(model, dataset)
    rows = [line.split("  ", 1) for line in "\n".join(pieces).split("\n")]
    assert title == "the model answers"
    assert [name for name, _ in rows] == ["asked", "model", "given"] * 3
    records = records_of(form, 11, 1)
    assert [text for name, text in rows if name == "given"] == [r.parts[-1] for r in records[:3]]
    shown = [text for name, text in rows if name == "asked"]
    assert all(record.parts[0] in text for record, text in zip(records, shown, strict=False))


def test_the_baseline_repeats_what_is_asked(workplace):
    val = [Record(("a wolf met the fox", "a wolf met the fox"), PAIR, "", "")]
    dataset = prepared(records_of("pairs", 9), val)
    found = task_of(CompletionTask, dataset)[0].baselines(dataset)
    assert found == pytest.approx(repeated_scores(val))
    assert found["bleu of repeating the text"] == pytest.approx(100)


@forms
def test_a_dataset_says_whether_it_holds_conversations(form, dataset):
    chat = form == "chats"
    keys = CompletionTask.fit(dataset)[1]
    assert keys["chat"] == dataset.meta["chat"] == chat
    assert keys["vocab_size"] == BARE.vocab_size + 2 * chat
    assert bool(dataset.meta["baselines"]) == (not chat)
    assert dataset.meta["task"] == CompletionTask.reads == Seq2SeqTask.reads
