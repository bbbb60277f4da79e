"""Laws of whole runs: `train.py` and `sample.py` as a user meets them, on a tiny text."""

import json
import re
import shlex
from functools import partial
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from conftest import TASKS, TINY
from outcomes import cut, frozen, numbers

from nanolm import sampling
from nanolm.precision import choose_engine, find_hardware
from nanolm.runs.checkpoint import load
from nanolm.runs.console import oddities
from nanolm.runs.pictures import draw_losses
from nanolm.runs.prepare import find_dataset, prepare
from nanolm.runs.run import Run
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import fit_to_task, start_run
from nanolm.system.config import load_config
from nanolm.tasks import causal
from nanolm.tasks.table import make_task
from nanolm.text.tokenizer import TOKENIZER_FILE, load_tokenizer


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    for name in ("draw_losses", "draw_confusion"):
        monkeypatch.setattr(f"nanolm.runs.pictures.{name}", lambda *_, **__: False)


def train(*arguments: str) -> Path:
    """Run the tiny config with these changes, in the current folder; returns its out_dir."""
    config = load_config(TrainConfig, [*TINY, "--out_dir=out/x", *arguments])
    start_run(config)
    return Path(config.out_dir)


# ------------------------------------------------------------------------------------------
# Resuming


@pytest.fixture
def batches_seen(monkeypatch) -> list:
    """Every training batch, in the order in which they are made."""
    seen, made = [], Run.micro_batches

    def recorded(run, step):
        for batch in made(run, step):
            seen.append({name: torch.from_numpy(array) for name, array in batch.items()})
            yield batch

    monkeypatch.setattr(Run, "micro_batches", recorded)
    return seen


MATRIX = [
    [f"--dtype={dtype}", f"--dropout={dropout}", f"--gradient_accumulation_steps={n}"]
    for dtype, dropout, n in product(("float32", "bfloat16"), (0.0, 0.1), (1, 4))
]
STEPS = range(1, 20, 2)  # ten of twenty


@pytest.mark.parametrize(
    "keys",
    [
        *MATRIX,
        *([*task, *keys] for task in TASKS.values() for keys in (MATRIX[3], MATRIX[4])),
        ["--dtype=float16", "--dropout=0.1"],
        ["--schedule=trapezoid", "--gradient_accumulation_steps=3", "--eval_interval=3"],
        ["--optimizer=muon", "--dropout=0.1", "--gradient_accumulation_steps=2"],
        ["--optimizer=muon", "--dtype=bfloat16"],
        ["--optimizer=lamb"],
        ["--optimizer=sgd"],
        ["--recompute=true", "--dropout=0.1"],
        pytest.param(["--compile=true", "--dropout=0.1"], marks=pytest.mark.long),
    ],
    ids=lambda keys: " ".join(keys),
)
def test_a_resumed_run_is_the_run_that_never_stopped(keys, tiny_run, batches_seen):
    """To the last bit: batches, losses, weights, optimizer, what is best; from each checkpoint."""
    keys = ["--eval_interval=1", *keys, "--max_iters=20", "--keep_checkpoints=99"]
    whole = train(*keys, "--out_dir=out/whole")
    batches = batches_seen[1:]  # the first one is only looked at
    steps = STEPS if "--compile=true" not in keys else (9,)
    for step in [step for step in steps if (whole / f"step_{step:08d}.pt").exists()]:
        copy = cut(whole, after=step)
        batches_seen.clear()
        train(*keys, f"--out_dir={copy}", "--init_from=resume")
        assert frozen(batches_seen[1:]) == frozen(batches[step * len(batches) // 20 :])
        pair = [frozen(load(folder / "step_00000020.pt")) for folder in (whole, copy)]
        assert pair[0] == pair[1]
        assert numbers(copy) == numbers(whole)


def test_a_resumed_run_keeps_what_auto_chose(tiny_run, monkeypatch, capsys):
    """Also where it would choose otherwise now, as with a larger max_iters."""
    folder = train("--compile=auto")
    monkeypatch.setattr("nanolm.precision.COMPILE_FROM_FLOPS", {"float32": 0.0})
    train("--compile=auto", "--init_from=resume", "--max_iters=6")
    assert "not compiled (as the run began)" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["engine"]["compile"] is False


def test_auto_starts_or_resumes_and_a_finished_run_says_so(tiny_run, capsys):
    train("--init_from=auto", "--max_iters=2", "--lr_decay_iters=4")
    train("--init_from=auto", "--max_iters=4", "--lr_decay_iters=4")
    assert "resumed at step 2" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path("out/x").iterdir()}
    train("--init_from=auto", "--max_iters=4", "--lr_decay_iters=4")
    assert "out/x is finished: 4 of 4 updates made" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path("out/x").iterdir()}


def test_changed_keys_are_listed_on_resume(tiny_run, capsys):
    train()
    train("--init_from=resume", "--max_iters=6", "--learning_rate=0.01", "--dropout=0.3")
    out = capsys.readouterr().out
    assert "changed   learning_rate: 0.0006 before, 0.01 now" in out
    assert "changed   dropout: 0.0 before, 0.3 now" in out
    assert "do not compare" not in out
    train("--init_from=resume", "--max_iters=7", "--eval_iters=2")
    assert "do not compare" in capsys.readouterr().out


@pytest.mark.parametrize(("warmup", "warns"), [(6, True), (5, False)])
def test_a_rate_that_never_reaches_its_peak_is_mentioned(warmup, warns, tiny_run, capsys):
    train("--max_iters=6", f"--warmup_iters={warmup}")
    assert ("the rate never reaches 0.0006" in capsys.readouterr().out) == warns


def test_keys_of_the_optimizer_that_change_on_resume_take_effect(tiny_run):
    """Its saved state holds the old ones, too."""
    train()
    folder = train("--init_from=resume", "--max_iters=6", "--weight_decay=0.5", "--beta2=0.5")
    groups = load(folder / "step_00000006.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {group["betas"][1] for group in groups} == {0.5}


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "sgd")])
def test_a_run_keeps_its_optimizer(before, after, tiny_run, run_main):
    """Whose memory means nothing to another; weights can start a new run under any."""
    folder = train(f"--optimizer={before}")
    flags = (*TINY, "--max_iters=6", f"--optimizer={after}")
    code, _, err = run_main("train", *flags, f"--out_dir={folder}", "--init_from=resume")
    assert code == 2
    assert f"optimizer is '{before}' there and '{after}' here" in err
    assert run_main("train", *flags, "--out_dir=out/new", f"--init_from={folder}")[0] == 0


def test_a_run_can_change_to_half_precision_on_resume(tiny_run):
    """There is no scale of losses yet to continue from."""
    train()
    folder = train("--init_from=resume", "--max_iters=6", "--dtype=float16")
    assert load(folder / "step_00000006.pt")["scaler"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tiny_run, capsys):
    folder = train()
    (folder / "step_00000004.pt").write_bytes(b"half")
    train("--init_from=resume")
    out = capsys.readouterr().out
    assert out.count("warning   cannot read the checkpoint out/x/step_00000004.pt") == 1
    assert "resumed at step 2" in out


# ------------------------------------------------------------------------------------------
# The run


def test_evaluation_never_changes_training(tiny_run):
    often = train("--out_dir=out/often", "--eval_interval=1", "--sample_tokens=9", "--dropout=0.3")
    rarely = train("--out_dir=out/rarely", "--eval_interval=4", "--dropout=0.3")
    pair = [frozen(load(folder / "step_00000004.pt")) for folder in (often, rarely)]
    assert pair[0]["model"] == pair[1]["model"]
    assert pair[0]["optimizer"] == pair[1]["optimizer"]


def test_a_run_leaves_its_files_and_no_others(tiny_run, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", draw_losses)
    folder = train("--keep_checkpoints=1")
    names = {"run.json", "nanolm_tokenizer.json", "metrics.jsonl", "loss.png"}
    names |= {"step_00000004.pt", "best.pt"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["n_embd"] == 8
    assert record["engine"] == {"device": "cpu", "dtype": "float32", "compile": False}
    assert record["versions"]["torch"] == torch.__version__


def test_of_equal_losses_the_first_stays_the_best(tiny_run):
    still = ["--learning_rate=1e-30", "--min_lr=0", "--weight_decay=0", "--eval_iters=0"]
    folder = train(*still, "--max_iters=4", "--eval_interval=1")
    assert load(folder / "best.pt")["step"] == 1


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(tiny_run):
    """At a rate that is too high, the loss rises again after its best."""
    folder = train(
        "--learning_rate=0.5", "--max_iters=8", "--keep_checkpoints=9", "--eval_iters=0"
    )
    rows = [row for row in numbers(folder) if "val_loss" in row and row["step"] > 0]
    lowest = min(rows, key=lambda row: row["val_loss"])
    assert lowest != rows[-1]
    best = load(folder / "best.pt")
    assert (best["step"], best["best"]) == (lowest["step"], lowest["val_loss"])


def test_only_the_newest_step_is_kept_when_asked(tiny_run):
    folder = train("--always_save_checkpoint=false", "--keep_checkpoints=5")
    assert [path.name for path in folder.glob("step_*")] == ["step_00000004.pt"]


def test_the_first_loss_is_about_that_of_a_blind_guess(tiny_run, capsys):
    folder = train("--eval_iters=0")
    guess = float(re.search(r"ln\(\d+\) = ([\d.]+)", capsys.readouterr().out)[1])
    assert abs(numbers(folder)[0]["val_loss"] - guess) < 0.1


def test_the_run_shows_itself(tiny_run, capsys):
    train("--max_iters=4")
    out = capsys.readouterr().out
    for label in ("run", "device", "precision", "compile", "data", "model", "updates", "loss"):
        assert re.search(rf"^{label} +\S", out, re.MULTILINE), label
    assert "parameters" in out
    assert re.search(r"4 of 16 tokens each: 0\.\d+ epochs", out)
    assert len(re.findall(r"^step +\d+ \| loss .* lr .* norm .* tok/s", out, re.MULTILINE)) == 4
    assert (
        len(re.findall(r"^step +\d+ \| train loss .* val loss .* bits per", out, re.MULTILINE))
        == 3
    )
    assert out.count("    | ") >= 3  # a sample at each evaluation
    assert "sample from it with: python sample.py --out_dir=out/x" in out
    share = re.search(r"^done +in .*s, evaluations (\d+)% of it$", out, re.MULTILINE)
    assert 0 < int(share[1]) < 100


def test_a_compiled_first_step_is_announced(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("nanolm.precision.COMPILE_FROM_FLOPS", {"float32": 0.0})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr("nanolm.precision.shutil.which", lambda name: name)
    train("--compile=auto")
    out = capsys.readouterr().out
    assert "the first steps take up to a minute, they compile" in out or "no C++ compiler" in out


@pytest.mark.parametrize("task", [[], *TASKS.values(), ["--recompute=true"]], ids=str)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_run_learns_what_an_eager_one_does(backend, task, tiny_run, monkeypatch):
    """And its checkpoints bear the same names."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager = train("--out_dir=out/eager", "--max_iters=2", *task)
    compiled = train("--out_dir=out/compiled", "--compile=true", "--max_iters=2", *task)
    pair = [load(folder / "step_00000002.pt")["model"] for folder in (eager, compiled)]
    assert pair[0].keys() == pair[1].keys()
    for key in pair[0]:
        assert (pair[0][key] - pair[1][key]).abs().max() <= 1e-4


def test_a_run_too_long_for_a_cpu_says_so_and_names_another_config(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("nanolm.runs.console.CPU_FLOPS_PER_THREAD", 1.0)
    train()
    assert re.search(
        r"warning +this run takes .* config/shakespeare_cpu\.py", capsys.readouterr().out
    )


def test_eval_only_evaluates_and_changes_nothing(tiny_run, capsys):
    folder = train()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    train("--eval_only=true", "--init_from=resume", "--eval_iters=0")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("step      4 | train loss ")
    train("--eval_only=true", "--out_dir=out/none")
    assert not Path("out/none").exists()


def test_the_checkpoints_in_a_folder_are_all_of_one_run(tiny_run):
    """An overwritten run goes as the new one begins, or a restart would take up the wrong one."""
    folder = train()
    with pytest.raises(ValueError, match="start again, with a lower"):
        train("--overwrite=true", "--learning_rate=1e30", "--max_iters=20")
    assert not list(folder.glob("*.pt"))
    assert not [row for row in numbers(folder) if row["step"] > 3]


def test_a_run_is_not_replaced_unless_told_to(tiny_run):
    """Not even one of which only the best is left."""
    folder = train()
    for path in folder.glob("step_*"):
        path.unlink()
    with pytest.raises(ValueError, match="out/x already holds a run"):
        train("--init_from=scratch")


def test_a_run_of_which_only_the_best_is_left_goes_on_from_there(tiny_run, capsys):
    """As the first save leaves it, when it is killed between its two names."""
    folder = train("--max_iters=2", "--lr_decay_iters=4")
    (folder / "step_00000002.pt").unlink()
    train("--init_from=auto", "--max_iters=4")
    assert "resumed at step 2" in capsys.readouterr().out


def test_no_checkpoint_holds_a_number_that_is_not_finite(tiny_run, capsys):
    """And the sound ones before it stay: they are the way out that the message names."""
    folder = train()
    with pytest.raises(ValueError, match="were not finite"):
        train("--init_from=resume", "--max_iters=20", "--eval_interval=1", "--learning_rate=1e30")
    assert "no checkpoint is written" in capsys.readouterr().out
    for path in folder.glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in load(path)["model"].values())
    train("--init_from=resume", "--max_iters=6")


def test_a_text_that_changed_under_a_run_is_mentioned(tiny_run, capsys):
    train()
    Path("text.txt").write_text(Path("text.txt").read_text()[::-1])
    prepare("tiny", inputs=("text.txt",), overwrite=True)
    train("--init_from=resume", "--max_iters=6")
    assert "changed   the text in data/tiny" in capsys.readouterr().out


def test_the_model_of_a_run_is_not_mistaken_for_a_fresh_one_by_eval_only(tiny_run):
    """It says nothing of the run that is there, unless told to resume it."""
    train()
    with pytest.raises(ValueError, match="out/x already holds a run"):
        train("--eval_only=true")


def test_a_config_file_may_have_any_name(tiny_run, run_main):
    lines = [word[2:].replace("=", " = ") for word in TINY if "=cpu" not in word]
    text = "\n".join(lines).replace("tiny", "'tiny'").replace("float32", "'float32'")
    Path("my.cfg").write_text(text.replace("false", "False"))
    code, out, err = run_main("train", "my.cfg", "--device=cpu")
    assert (code, err) == (0, "")
    assert "no config file" not in out
    assert Path("out/my/best.pt").exists()


def test_overwrite_replaces_a_run_and_nothing_else(tiny_run):
    folder = train()
    (folder / "notes.txt").write_text("mine")
    train("--overwrite=true", "--max_iters=2")
    assert [path.name for path in folder.glob("step_*")] == ["step_00000002.pt"]
    assert [row["step"] for row in numbers(folder)] == [0, 0, 1, 2]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_can_start_from_the_weights_of_another(tiny_run):
    """It takes over their shape, and starts where their loss is."""
    source = load(tiny_run / "best.pt")
    folder = train(f"--init_from={tiny_run}", "--n_embd=16", "--eval_iters=0", "--max_iters=2")
    assert json.loads((folder / "run.json").read_text())["config"]["n_embd"] == 8
    again = train("--eval_only=true", f"--init_from={tiny_run}", "--out_dir=out/y")
    assert not again.exists()
    first = numbers(folder)[0]["val_loss"]
    assert first == pytest.approx(source["best"], abs=0.2)
    assert numbers(folder)[0]["step"] == 0


def test_a_run_from_weights_resumes_with_the_flags_it_began_with(tiny_run):
    """They may say nothing of the shape, or another one: it came with the weights.

    A finetuned GPT-2 could not be resumed: its biases are not what an empty config has.
    """
    flags = [*TINY, "--n_layer=3", "--out_dir=out/x", f"--init_from={tiny_run}"]
    start_run(load_config(TrainConfig, [*flags, "--max_iters=2"]))
    for way, steps in (("resume", 4), ("auto", 6)):
        start_run(load_config(TrainConfig, [*flags, f"--max_iters={steps}", f"--init_from={way}"]))
    config = load("out/x/step_00000006.pt")["config"]
    assert (config["n_layer"], config["norm"], config["init_from"]) == (1, "rms", str(tiny_run))


def test_a_run_goes_on_without_its_config_file(tiny_run, run_main):
    """It once took config/pydocs.py, and complained about another tokenizer."""
    words = ["--out_dir=out/tiny", "--init_from=resume", "--max_iters=6"]
    code, out, err = run_main("train", *words)
    assert (code, err) == (0, "")
    assert out.startswith("no config file given: going on as out/tiny/run.json says\n")
    assert "resumed at step 4" in out


def test_a_run_without_its_record_asks_for_its_config_file(tiny_run, run_main):
    """It once took config/pydocs.py, prepared that text, and then complained of it."""
    Path("out/tiny/run.json").unlink()
    code, out, err = run_main("train", "--out_dir=out/tiny", "--init_from=resume")
    assert (code, out) == (2, "")
    assert err.startswith("error: no out/tiny/run.json to read: train there first, or name its")


def test_one_line_starts_and_continues_a_finetuning(tiny_run, capsys):
    """With nothing to resume, auto begins with the weights; later it does not go back to them."""
    line = [*TINY, "--out_dir=out/x", "--init_from=auto", f"--pretrained={tiny_run}"]
    said = []
    for steps in (2, 4):
        start_run(load_config(TrainConfig, [*line, f"--max_iters={steps}"]))
        said.append(capsys.readouterr().out)
    assert f"from the weights of {tiny_run}" in said[0]
    assert "resumed at step 2" in said[1]
    whole = [*TINY, "--out_dir=out/y", f"--init_from={tiny_run}", "--max_iters=4"]
    start_run(load_config(TrainConfig, [*whole, "--lr_decay_iters=4"]))
    assert [row["step"] for row in numbers("out/x")] == [row["step"] for row in numbers("out/y")]


def test_a_smaller_context_cuts_the_positions_of_the_weights(tiny_run, capsys):
    source = train("--max_iters=1")
    still = ["--learning_rate=1e-30", "--min_lr=0", "--weight_decay=0", "--max_iters=1"]
    folder = train(f"--init_from={source}", "--out_dir=out/y", "--block_size=5", *still)
    assert "cut to 5 tokens, of 8" in capsys.readouterr().out
    before, after = (
        load(path / "best.pt")["model"]["positions.weight"] for path in (source, folder)
    )
    assert torch.equal(after, before[:5])


def test_two_runs_cannot_write_to_one_folder(tiny_run):
    from nanolm.system.files import lock

    folder = train()
    with lock(folder), pytest.raises(ValueError, match="out/x is in use by another process"):
        train("--init_from=resume", "--max_iters=9")


# ------------------------------------------------------------------------------------------
# Sampling


def test_sampling_continues_the_prompt_and_takes_the_newest_run(tiny_run, run_main):
    code, out, err = run_main(
        "sample", "--start=1 little", "--num_samples=2", "--max_new_tokens=7"
    )
    assert code == 0
    dtype = choose_engine(find_hardware()).dtype
    assert err == f"sampling from out/tiny, step 4, cpu {dtype}\n" or "step 2" in err
    texts = out.split("\n---------------\n")
    assert texts[2] == ""
    assert all(text.startswith("1 little") and len(text) == 8 + 7 for text in texts[:2])
    assert texts[0] != texts[1]
    assert (
        run_main("sample", "--start=1 little", "--num_samples=2", "--max_new_tokens=7")[1] == out
    )


def test_texts_are_written_side_by_side(tiny_run, run_main, monkeypatch):
    """Of five texts two at a time; each is a row of its batch, and none is like another."""
    batches, generate = [], causal.generate

    def watched(*args, **options):
        batches.append(torch.stack(list(generate(*args, **options)), dim=1))
        yield from batches[-1].T

    monkeypatch.setattr(causal, "generate", watched)
    flags = ["--num_samples=5", "--batch_size=2", "--max_new_tokens=9", "--start=1 little"]
    texts = run_main("sample", *flags)[1].split("\n---------------\n")[:-1]
    tokenizer = load_tokenizer(Path("out/tiny"))
    rows = [row.tolist() for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert texts == ["1 little" + tokenizer.decode(row) for row in rows]
    assert len(set(texts)) == 5


def test_the_first_text_is_shown_while_it_is_written(tiny_run, run_main, monkeypatch):
    """And no more steps are made than the longest of the texts needs."""
    made, shown = [], []

    def watched(model, ids, **options):
        for i in range(100):
            made.append(i)
            yield torch.full((len(ids),), i % 3)

    monkeypatch.setattr(causal, "generate", watched)
    monkeypatch.setattr(
        sampling,
        "until",
        lambda pieces, stop: (shown.append(len(made)) or p for p in islice(pieces, 7)),
    )
    run_main("sample", "--num_samples=3")
    assert shown[:7] == list(range(1, 8))
    assert len(made) == 7


def test_sampling_reads_prompts_from_files_and_stops_where_told(tiny_run, run_main):
    Path("prompt.txt").write_text("12 little wol")
    flags = [
        "--start=FILE:prompt.txt",
        "--num_samples=3",
        "--max_new_tokens=60",
        "--temperature=9",
    ]
    code, out, _ = run_main("sample", *flags, "--out_dir=out/tiny")
    _, stopped, _ = run_main("sample", *flags, "--init_from=out/tiny", "--stop=e")
    assert code == 0
    ends = [text.removeprefix("12 little wol") for text in out.split("\n---------------\n")][:3]
    cuts = [text.removeprefix("12 little wol") for text in stopped.split("\n---------------\n")][
        :3
    ]
    assert ends[0].split("e")[0] == cuts[0]  # later ones differ: fewer random numbers were drawn
    assert all("e" not in cut for cut in cuts)


def test_sampling_greedily_needs_no_seed(tiny_run, run_main):
    flags = ["--temperature=0", "--num_samples=2", "--max_new_tokens=9", "--top_p=0.9"]
    _, first, _ = run_main("sample", *flags)
    _, other, _ = run_main("sample", *flags, "--seed=3")
    assert first == other
    assert len(set(first.split("\n---------------\n")[:2])) == 1


def test_a_run_with_labels_begins_with_the_weights_of_a_masked_one(tiny_run, capsys):
    """All but its head are taken over, and the mask that the dataset's tokens lack."""
    prepare("more", task="classification", inputs=("kinds.csv",), tokenizer="data/words")
    masked = train(*TASKS["masked"], "--out_dir=out/masked")
    keys = ["--task=classification", "--dataset=more", "--init_from=out/masked"]
    folder = train(*keys, "--learning_rate=1e-12", "--min_lr=0", "--out_dir=out/labels")
    assert "head      fresh: 2 labels" in capsys.readouterr().out
    before, after = (load(path / "best.pt")["model"] for path in (masked, folder))
    assert after["head.weight"].shape == (2, 8)
    for name in after:
        if not name.startswith(("head.", "transform.")):
            assert torch.allclose(before[name], after[name], atol=1e-6), name
    assert load_tokenizer(folder / TOKENIZER_FILE) == load_tokenizer(masked / TOKENIZER_FILE)


def test_a_decoder_cannot_be_trained_as_an_encoder(tiny_run):
    train("--dataset=words", "--out_dir=out/decoder")
    with pytest.raises(ValueError, match="out/decoder is a decoder, and task='masked' trains an"):
        train(*TASKS["masked"], "--init_from=out/decoder")


def test_the_best_may_be_chosen_by_another_score(tiny_run):
    keys = [*TASKS["masked"], "--best_by=accuracy", "--max_iters=20", "--eval_interval=1"]
    folder = train(*keys, "--learning_rate=0.1", "--keep_checkpoints=99", "--eval_iters=0")
    rows = [row for row in numbers(folder) if "val_loss" in row and row["step"] > 0]
    highest = max(rows, key=lambda row: row["accuracy"])
    assert load(folder / "best.pt")["step"] == highest["step"]
    assert highest["step"] != min(rows, key=lambda row: row["val_loss"])["step"]


def test_what_fills_up_a_batch_is_not_counted_as_work(tiny_run):
    config = load_config(TrainConfig, [*TINY, *TASKS["classification"], "--batch_size=5"])
    config, dataset = fit_to_task(config, find_dataset(config.dataset))
    run = Run(config, Path(), dataset, make_task(config, dataset.tokenizer), None, None, None)
    [batch] = run.micro_batches(3)
    assert run.tokens == batch["mask"].sum() < batch["mask"].size


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_iters": 30, "warmup_iters": 40}, ["never reaches 0.0006: warmup_iters=40 "]),
        ({"min_lr": 6e-4}, ["hardly falls: min_lr=0.0006 "]),
        ({"max_iters": 3000, "lr_decay_iters": 5000}, ["ends at 0.000465, above min_lr: "]),
        ({"min_lr": 6e-4, "max_iters": 9}, ["never reaches", "hardly falls"]),
        ({}, []),
        ({"lr_decay_iters": 5000, "max_iters": 9000}, []),
    ],
)
def test_a_plan_of_the_rate_that_nobody_may_have_meant_is_named(keys, said):
    found = list(oddities(TrainConfig(**keys)))
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))


def test_such_a_plan_is_named_at_the_start_of_a_run(tiny_run, run_main):
    for keys, n in (["--warmup_iters=9"], 1), (["--warmup_iters=9", "--decay_lr=false"], 0):
        out = run_main("train", *TINY, "--out_dir=out/x", "--overwrite", *keys)[1]
        assert out.count("warning   the rate never reaches ") == n


def test_commands_that_are_printed_can_be_pasted(tiny_run, run_main):
    """They once named out_dir as it is, with its blanks."""
    words = ("train", *TINY, "--out_dir=out/it's a run")
    _, out, _ = run_main(*words)
    _, _, err = run_main(*words)
    pasted = re.search(r"sample from it with: python (.*)", out)[1], "--max_new_tokens=2"
    code, _, said = run_main("sample", *shlex.split(" ".join(pasted))[1:])
    assert (code, "sampling from out/it's a run, step 4" in said) == (0, True)
    resuming = re.search(r"continue the run with python (.*), or replace", err)[1]
    code, out, _ = run_main("train", *shlex.split(resuming)[1:])
    assert (code, "out/it's a run is finished" in out) == (0, True)
