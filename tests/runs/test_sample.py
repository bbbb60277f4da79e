"""Laws of `sample.py` with documents: a text ends where its document does."""

from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TASKS, TINY

import sample
from nanolm.precision import Hardware
from nanolm.tasks import causal
from nanolm.text.data import open_dataset

STORY = "Hi."


@pytest.fixture
def storyteller(workplace, run_main, monkeypatch) -> None:
    """The current folder, with a run that has learned one very short story."""
    # drawing takes longer
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)
    Path("a.jsonl").write_text(f'{{"text": "{STORY}"}}\n' * 200)
    run_main("prepare", "stories", "--input=a.jsonl", "--tokenizer=bpe:257")
    keys = ("--max_iters=100", "--learning_rate=0.05", "--eval_interval=100", "--batch_size=8")
    code, _, err = run_main("train", *TINY, "--dataset=stories", "--out_dir=out/x", *keys)
    assert (code, err) == (0, "")


def test_a_sample_ends_with_its_document_and_a_prompt_may_begin_one(
    storyteller, run_main, monkeypatch
):
    """The token that stands between documents is never written; as a prompt it is understood."""
    generate = Mock(wraps=causal.generate)
    monkeypatch.setattr(causal, "generate", generate)
    for start, rest in [("<|endoftext|>", STORY), (STORY[:1], STORY[1:]), (STORY, "")]:
        out = run_main("sample", f"--start={start}", "--temperature=0", "--num_samples=2")[1]
        assert out == f"{start}{rest}\n---------------\n" * 2
    assert run_main("sample", "--temperature=0", "--num_samples=1")[1] == f"{STORY}\n{'-' * 15}\n"
    assert generate.call_args_list[0].args[1].tolist() == [[256]] * 2  # and not its letters


@pytest.mark.parametrize(
    ("text", "tokenizer", "begin"),
    [
        ("wolf\nfox\n" * 99, "bpe:257", "\n"),  # the end comes once, in the validation text
        ("wolf\nfox\n<|endoftext|>" * 99, "bpe:257", "<|endoftext|>"),
        ("GATTACA" * 99, "bpe:257", "G"),
        ("GATTACA" * 99, "char", "G"),  # no line ends at all: what train.py said failed
    ],
)
def test_every_sample_begins_after_a_token_of_the_training_text(
    text, tokenizer, begin, workplace, run_main, monkeypatch
):
    generate = Mock(wraps=causal.generate)
    monkeypatch.setattr(causal, "generate", generate)
    Path("a.txt").write_text(text)
    run_main("prepare", "tiny", "--input=a.txt", f"--tokenizer={tokenizer}")
    out = run_main("train", *TINY, "--out_dir=out/x")[1]
    command = out.partition("sample from it with: python sample.py ")[2].split()
    assert run_main("sample", *command, "--max_new_tokens=9", "--device=cpu")[0] == 0
    found = open_dataset("tiny").tokenizer.encode(begin, allowed_special="all")
    assert len(generate.call_args_list) == 5  # three while training, two of sample.py
    assert {tuple(row) for call in generate.call_args_list for row in call.args[1].tolist()} == {
        tuple(found)
    }


def test_a_run_goes_on_with_a_text_that_begins_otherwise(workplace, run_main):
    Path("a.txt").write_text("wolf\nfox\n" * 99)
    Path("b.txt").write_text("wolf\nfox\n<|endoftext|>" * 99)
    for name, path in (("tiny", "a.txt"), ("other", "b.txt")):
        run_main("prepare", name, f"--input={path}", "--tokenizer=bpe:257")
    run_main("train", *TINY, "--out_dir=out/x")
    words = ("--out_dir=out/x", "--init_from=resume", "--dataset=other", "--max_iters=6")
    code, out, err = run_main("train", *words)
    assert (code, err) == (0, "")
    assert "changed   begin_id: 10 before, 256 now" in out


@pytest.mark.parametrize(
    ("hardware", "tokens", "compiled"),
    [
        (Hardware(compiler=True), 10**9, False),
        (Hardware(cuda=True, compiler=True, triton=True), 500, False),
        (Hardware(cuda=True, compiler=True, triton=True), 10**5, True),
        (Hardware(cuda=True, compiler=True), 10**5, False),
    ],
)
def test_sampling_compiles_on_a_gpu_that_has_much_to_write(hardware, tokens, compiled):
    config = sample.SampleConfig(max_new_tokens=tokens)
    assert sample.sampling_engine(config, hardware).compile == compiled


@pytest.mark.long
def test_a_compiled_model_writes_the_same_texts(storyteller, run_main):
    flags = ("--start=<|endoftext|>", "--temperature=0", "--num_samples=3", "--batch_size=2")
    eager = run_main("sample", *flags)
    assert run_main("sample", *flags, "--compile=true") == eager
    assert eager[0] == 0


@pytest.mark.parametrize(
    ("task", "start", "said"),
    [
        ("causal", "0 little", ""),
        ("causal", "0 little wolves", "the prompt has 15 tokens: the model sees the last 8 "),
        ("classification", "0 and 1", ""),
        ("classification", "0 and 1 wolves", "sees the first 8 (block_size)"),
    ],
)
def test_a_text_that_the_model_sees_only_a_part_of_is_named_once(
    task, start, said, tiny_run, run_main, monkeypatch
):
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)
    monkeypatch.setattr("nanolm.runs.pictures.draw_confusion", lambda *_, **__: False)
    keys = TASKS.get(task, [])
    assert run_main("train", *TINY, *keys, "--out_dir=out/x", "--block_size=8")[0] == 0
    flags = ("--out_dir=out/x", "--max_new_tokens=2", "--batch_size=1", "--num_samples=2")
    Path("lines.txt").write_text(f"0\n{start}\n0\n")
    for word in f"--start={start}", "--input=lines.txt":
        code, _, err = run_main("sample", *flags, word)
        place = "lines.txt, line 2" if "input" in word else "the prompt"
        assert (code, err.count("warning: ")) == (0, bool(said))
        assert said.replace("the prompt", place) in err
