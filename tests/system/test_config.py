"""Laws of the configuration: later wins, types are kept, and a file is data, never a program."""

import ast
import dataclasses
import json
import math
import os
import re
import subprocess

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanolm.layers import MLPS
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import coerce, help_text, load_config, quoted, read_config_file


def train_config(*arguments: str) -> TrainConfig:
    return load_config(TrainConfig, arguments)


@pytest.fixture
def config_file(workplace):
    """Write a config file of some lines; returns its path."""

    def write(*lines: str) -> str:
        (workplace / "run.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return "run.py"

    return write


# ------------------------------------------------------------------------------------------
# Who wins


def test_command_line_beats_file_beats_defaults(config_file):
    path = config_file("n_layer = 3", "n_head = 4")
    config = train_config(path, "--n_layer=5")
    assert (config.n_layer, config.n_head, config.batch_size) == (5, 4, TrainConfig().batch_size)
    assert train_config("--n_layer=5", path).n_layer == 5  # wherever the words stand


def test_later_files_and_later_flags_win(workplace):
    (workplace / "a.py").write_text("n_layer = 2\nn_head = 3\n")
    (workplace / "b.py").write_text("n_layer = n_layer * 5\n")  # sees what the file before says
    config = train_config("a.py", "b.py", "--seed=1", "--seed=2")
    assert (config.n_layer, config.n_head, config.seed) == (10, 3, 2)


def test_no_words_give_the_defaults():
    assert train_config() == TrainConfig()


# ------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--n_layer=3"], "n_layer", 3),
        (["--n_layer", "3"], "n_layer", 3),
        (["--max_iters=1e3"], "max_iters", 1000),
        (["--learning_rate=1", "--min_lr=0"], "learning_rate", 1.0),
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "--seed=1"], "overwrite", True),
        (["--overwrite", "false"], "overwrite", False),
        (["--overwrite=False"], "overwrite", False),
        (["--overwrite=1"], "overwrite", True),
        (["--bias=0"], "bias", False),
        (["--compile=false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--compile=auto"], "compile", "auto"),
        (["--compile", "false"], "compile", False),
        (["--wandb_project=a=b=c"], "wandb_project", "a=b=c"),
        (["--wandb_project="], "wandb_project", ""),
        (["--wandb_project=17"], "wandb_project", "17"),
        (["--wandb_project", "two words"], "wandb_project", "two words"),
        (["--lr_decay_iters=None"], "lr_decay_iters", None),
        (["--lr_decay_iters=none"], "lr_decay_iters", None),
        (["--lr_decay_iters=7"], "lr_decay_iters", 7),
        (["--out_dir=None"], "out_dir", None),
    ],
)
def test_words_become_values_of_the_wanted_type(words, key, value):
    found = getattr(train_config(*words), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--n_layer=1.5", "n_layer=1.5: must be a whole number"),
        ("--n_layer=two", "n_layer='two': must be a whole number"),
        ("--n_layer=", "n_layer='': must be a whole number"),
        ("--n_layer=true", "n_layer='true': must be a whole number"),
        ("--n_layer=none", "n_layer='none': must be a whole number"),
        ("--learning_rate=fast", "learning_rate='fast': must be a number"),
        ("--learning_rate=nan", "learning_rate=nan: must be a finite number"),
        ("--learning_rate=inf", "learning_rate=inf: must be a finite number"),
        ("--max_iters=1e999", "max_iters=inf: must be a finite number"),
        ("--lr_decay_iters=-inf", "lr_decay_iters=-inf: must be a finite number"),
        ("--overwrite=maybe", "overwrite='maybe': must be True or False"),
        ("--lr_decay_iters=2.5", "lr_decay_iters=2.5: must be a whole number or None"),
        ("--dataset", "argument --dataset: expected one argument"),
    ],
)
def test_words_of_the_wrong_type_are_refused(word, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        train_config(word)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (r"\n", "\n"),
        (r"\n\n\t", "\n\n\t"),
        (r"\nabla", r"\nabla"),  # as in LaTeX and in code
        (r"a\n", r"a\n"),
        ("~/a", "~/a"),
        ("none", "none"),
        ("None", None),
    ],
)
def test_a_prompt_stands_for_itself_but_for_what_cannot_be_typed(word, value):
    """--stop='\\n' once looked for a backslash, and --start=none was no prompt."""
    config = load_config(class_of("sample"), [f"--start={word}", f"--stop={word}"])
    assert (config.start, config.stop) == (value, value)


def test_a_tilde_is_the_home_folder(config_file, monkeypatch):
    """The shell leaves --out_dir=~/x as it is; a folder of the name ~ was made."""
    monkeypatch.setenv("HOME", "/home/me")
    assert train_config("--out_dir=~/x").out_dir == "/home/me/x"
    assert train_config(config_file("out_dir = '~/x'")).out_dir == "/home/me/x"
    words = ["new", "--input", "~/a", "b~", "--tokenizer=~"]
    config = load_config(class_of("prepare"), words, positional=("name",))
    assert (config.input, config.tokenizer) == (("/home/me/a", "b~"), "/home/me")


@given(st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])) | st.binary())
@example(b"a \xff'\n7")
@example("")
@settings(max_examples=30)
def test_a_quoted_word_is_one_word_of_the_shell(word):
    name = word if isinstance(word, str) else os.fsdecode(word.replace(b"\0", b""))
    script = f"printf %s {quoted(name)}".encode()  # what can be printed, and so copied
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert said == os.fsencode(name)


def test_a_key_is_not_the_value_of_the_key_before_it():
    with pytest.raises(ValueError, match="argument --out_dir: expected one argument"):
        train_config("--out_dir", "--overwrite")


@pytest.mark.parametrize(
    ("key", "near"),
    [("n_layers", "n_layer"), ("batchsize", "batch_size"), ("learnig_rate", "learning_rate")],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, near, config_file):
    for words in ([f"--{key}=3"], [config_file("seed = 1", f"{key} = 3")]):
        with pytest.raises(ValueError, match=f"unknown key '{key}': did you mean .*{near}"):
            train_config(*words)


@pytest.mark.parametrize(
    ("script", "word", "said"),
    [
        ("sample", "--prompt=x", "did you mean start?"),
        ("sample", "--lr=1", "see --help"),
        ("sample", "--config=a.py", "without a key"),
        ("train", "--lr=1", "did you mean learning_rate?"),
        ("train", "-lr=1", "did you mean learning_rate?"),
        ("train", "--epochs=3", "did you mean max_iters?"),
    ],
)
def test_a_key_of_another_name_is_found_by_what_it_says(script, word, said):
    """Who comes from elsewhere writes --prompt."""
    match = f"unknown key '{word.lstrip('-').split('=')[0]}': .*{re.escape(said)}"
    with pytest.raises(ValueError, match=match):
        load_config(class_of(script), [word])


def test_a_dataset_in_the_place_of_a_config_file_is_told_its_key():
    with pytest.raises(FileNotFoundError, match=r"no config file mytext; .*--dataset=mytext"):
        train_config("mytext")


def test_a_key_like_no_other_is_answered_with_help():
    with pytest.raises(ValueError, match=r"unknown key 'zzzzqqqq': see --help"):
        train_config("--zzzzqqqq=1")


# ------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("n_layer = 1e1", 10),
        ("learning_rate = 1", 1.0),
        ("lr_decay_iters = None", None),
        ("compile = False", False),
        ("compile = 'auto'", "auto"),
        ("overwrite = True", True),
        ("wandb_project = 'a = b'", "a = b"),
    ],
)
def test_file_values_keep_their_type(line, value, config_file):
    found = getattr(train_config(config_file(line)), line.split()[0])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "line",
    [
        "n_layer = 1.5",
        "n_layer = True",
        "n_layer = '3'",
        "n_layer = None",
        "learning_rate = False",
        "learning_rate = '1e-3'",
        "overwrite = 1",
        "overwrite = 'true'",
        "dataset = 3",
        "dataset = None",
        "compile = 1",
        "learning_rate = 1e999",
        "learning_rate = 1e999 - 1e999",
        "learning_rate = 1" + 400 * "0",
        "wandb_run_name = True",
    ],
)
def test_file_values_of_the_wrong_type_are_refused(line, config_file):
    with pytest.raises(ValueError, match=line.split()[0]):
        train_config(config_file(line))


def test_coerce_says_what_is_wanted():
    with pytest.raises(ValueError, match=r"^k=True: must be a whole number or None$"):
        coerce("k", True, int | None)
    with pytest.raises(ValueError, match=r"^k=1: must be True or False or a text in quotes$"):
        coerce("k", 1, bool | str)


# ------------------------------------------------------------------------------------------
# A file is data


literals = st.one_of(
    st.integers(0, 10**6).map(str),
    st.floats(0, 1e9, allow_nan=False).map(repr),
    st.sampled_from(["0", "1e308", "1_000", "0x10", ".5", "3."]),
)
expressions = st.recursive(
    literals,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner).map(" ".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(st.sampled_from("+-"), inner).map("".join),
    ),
    max_leaves=12,
)


@given(expressions)
@example("7 // -2 * 3 - -4 / 5")
@example("2 - 3 - 4")
@example("1 / 0")
@example("1e308 * 10 - 1e308 * 10")
def test_arithmetic_is_that_of_python(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "arithmetic.py"
    path.write_text(f"x = {text}\n")
    try:
        expected = eval(text, {"__builtins__": {}})
    except ArithmeticError:
        with pytest.raises(ValueError, match="line 1"):
            read_config_file(path, {})
        return
    found = read_config_file(path, {})["x"]
    assert type(found) is type(expected)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_earlier_names_and_defaults_can_be_used(config_file):
    config = train_config(
        config_file(
            '"""A docstring."""',
            "n_head = 3  # a comment",
            "n_embd = n_head * 16",
            "n_head = n_kv_head = n_head * 2",
            "batch_size = batch_size // 5",  # the default
            "min_lr = learning_rate / 10",
        )
    )
    assert (config.n_head, config.n_kv_head, config.n_embd) == (6, 6, 48)
    assert config.batch_size == TrainConfig().batch_size // 5
    assert config.min_lr == TrainConfig().learning_rate / 10


@pytest.mark.parametrize("name", ["pydocs", "shakespeare"])
def test_what_a_file_computes_follows_a_flag(name):
    """--learning_rate=5e-4 once met a min_lr of 5e-4 there, and the rate was the same throughout;
    5e-5 was refused for a min_lr that nobody had given.
    """
    path = str(ROOT / "config" / f"{name}.py")
    for rate in (5e-4, 5e-5, 1):
        config = train_config(path, f"--learning_rate={rate}")
        assert (config.learning_rate, config.min_lr) == (rate, rate / 10)
    assert train_config(path, "--learning_rate=5e-4", "--min_lr=1e-4").min_lr == 1e-4
    assert train_config(path).min_lr == train_config(path).learning_rate / 10


def test_a_flag_counts_from_the_first_line_of_every_file(workplace):
    (workplace / "a.py").write_text("n_embd = n_head * 16\nn_head = n_head * 2\n")
    (workplace / "b.py").write_text("n_head = 3\nn_hidden = n_head * 5\n")
    config = train_config("a.py", "b.py", "--n_head=7")
    assert (config.n_head, config.n_embd, config.n_hidden) == (7, 112, 35)
    with pytest.raises(ValueError, match=r"^n_head='two': must be a whole number"):
        train_config("a.py", "--n_head=two")


REFUSED = """
n_layer = open('made', 'w')
n_layer = __import__('os').mkdir('made')
n_layer = int(3)
open('made', 'w')
import os
import os; os.mkdir('made')
from os import mkdir
n_layer = 2 ** 3
n_layer = 'a'.count
n_layer = n_head.real
dataset = f'{n_head}'
dataset = f'{open("made", "w")}'
n_layer = [open('made', 'w') for i in (1,)]
n_layer = [1][0]
n_layer = 'abc'[0]
n_layer = (lambda: 3)
n_layer = (n_head := 3)
n_layer: int = 3
n_layer, n_head = 1, 2
n_layer = n_head[0] = 3
n_layer.real = 3
(n_layer) += 1
n_layer -= 1
del n_layer
if True: n_layer = 3
for n_layer in (1,): open('made', 'w')
while True: pass
with open('made', 'w') as n_layer: pass
def n_layer(): pass
class n_layer: pass
try: n_layer = 3
assert True
pass
raise ValueError
global n_layer
n_layer = 3 if True else 4
n_layer = 3 or 4
n_layer = not 3
n_layer = 3 < 4
n_layer = ~3
n_layer = 3 % 2
n_layer = 3 << 2
n_layer = 3 | 4
n_layer = 3 @ 4
n_layer = [3]
n_layer = (3, 4)
n_layer = {3: 4}
n_layer = {3}
n_layer = ...
n_layer = 3j
n_layer = b'3'
n_layer = True + 1
n_layer = -True
n_layer = None + 1
dataset = 'a' + 'b'
dataset = 'a' * 3
dataset = -'a'
n_layer = nowhere
n_layer = print
n_layer = 1 / 0
n_layer = 1 // 0
n_layer = (1
n_layer 3
n_layer = 'a
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_all_else_is_refused_unexecuted_with_its_line(line, config_file, workplace):
    more = ["except ValueError: pass"] if line.startswith("try") else []
    path = config_file("seed = 1", "# a comment", line, *more, "n_head = 4")
    with pytest.raises(ValueError, match=r"^run\.py, line 3: ") as raised:
        train_config(path)
    assert "object has no attribute" not in str(raised.value)
    assert [p.name for p in workplace.iterdir()] == ["run.py"]


@pytest.mark.parametrize(
    "content", [b"seed = '\xff'\n", b"seed = 1\0\n", b"seed = " + 20000 * b"-" + b"1\n"]
)
def test_what_is_no_text_or_too_deep_is_refused(content, workplace):
    (workplace / "run.py").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.py, line 1"):
        train_config("run.py")


def test_a_long_sum_is_refused_or_right(config_file):
    path = config_file("seed = " + "1 + " * 20000 + "1")
    try:
        found = train_config(path).seed
    except ValueError as error:
        found = str(error)
    assert found == 20001 or "run.py, line 1" in found


def test_a_missing_file_is_answered_with_those_there(workplace):
    (workplace / "config").mkdir()
    (workplace / "config" / "mine.py").touch()
    with pytest.raises(FileNotFoundError, match=r"no config file other.py; .*config.mine\.py"):
        train_config("other.py")


def test_the_folder_of_a_run_is_no_config_file_and_is_told_from_one(workplace):
    (workplace / "out").mkdir()
    with pytest.raises(FileNotFoundError, match=r"out is a folder, .*--out_dir=out, "):
        load_config(class_of("sample"), ["out"])


def test_a_record_of_a_run_is_a_config_file(workplace):
    """What has left nanolm since then is left out."""
    record = {"config": {"n_layer": 3, "gone": 1}, "processes": 2}
    (workplace / "run.json").write_text(json.dumps(record))
    assert train_config("run.json", "--n_head=4") == TrainConfig(n_layer=3, n_head=4)


# ------------------------------------------------------------------------------------------
# nanoGPT's files mean here what they mean there

NANOGPT = {
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": "1e-3",
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": "1e-4",
        "beta2": 0.99,
        "warmup_iters": 100,
    },
    "train_gpt2": {
        "wandb_log": True,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2-124M",
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": "5 * 8",
        "max_iters": 600000,
        "lr_decay_iters": 600000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "log_interval": 10,
        "weight_decay": "1e-1",
    },
    **{
        f"eval_{name.replace('-', '_')}": {
            "batch_size": 8,
            "eval_iters": 500,
            "eval_only": True,
            "wandb_log": False,
            "init_from": name,
        }
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
}
WORTH = {"5 * 8": 40, "1e-1": 0.1, "1e-3": 0.001, "1e-4": 0.0001}


@pytest.mark.parametrize("name", NANOGPT)
def test_the_config_files_of_nanogpt_are_understood(name, config_file):
    written = NANOGPT[name]
    lines = [
        f"{key} = {value if value in WORTH else repr(value)}  # a remark"
        for key, value in written.items()
    ]
    config = dataclasses.asdict(train_config(config_file("# a title", "", *lines)))
    for key, value in written.items():
        assert (key, config.pop(key)) == (key, WORTH.get(value, value))
    others = dataclasses.asdict(TrainConfig())  # the rest follows nanoGPT's defaults
    derived = {"head_size", "n_kv_head", "n_hidden"}
    assert {key: config[key] for key in config.keys() - derived} == {
        key: others[key] for key in config.keys() - derived
    }


def test_the_defaults_are_those_of_nanogpt():
    config = TrainConfig()
    expected = {
        "eval_interval": 2000,
        "log_interval": 1,
        "eval_iters": 200,
        "eval_only": False,
        "always_save_checkpoint": True,
        "init_from": "scratch",
        "wandb_log": False,
        "dataset": "openwebtext",
        "gradient_accumulation_steps": 40,
        "batch_size": 12,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": False,
        "learning_rate": 6e-4,
        "max_iters": 600000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "decay_lr": True,
        "warmup_iters": 2000,
        "min_lr": 6e-5,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rate(600000) == config.min_lr  # lr_decay_iters is 600000 there


def test_a_config_file_that_calls_the_clock_is_refused_with_its_line(config_file):
    path = config_file("eval_iters = 40", "wandb_run_name = 'ft-' + str(time.time())")
    with pytest.raises(ValueError, match=r"line 2: 'str\(time\.time\(\)\)' is not allowed"):
        train_config(path)
    path = config_file("import time", "eval_iters = 40")
    with pytest.raises(ValueError, match=r"line 1: 'import time' is not .* data, no program"):
        train_config(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_the_config_files_of_this_project_are_sound(path):
    assert train_config(str(path)) != TrainConfig()


# ------------------------------------------------------------------------------------------
# Round trip

texts = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: text[:1] != "~")
positive = st.integers(1, 10**9)
values = st.fixed_dictionaries(
    {},
    optional={
        "out_dir": st.none() | texts.filter(lambda text: text.lower() != "none"),
        "wandb_project": texts,
        "dataset": texts,
        "overwrite": st.booleans(),
        "decay_lr": st.booleans(),
        "compile": st.booleans() | st.just("auto"),
        "lr_decay_iters": st.none() | positive,
        "batch_size": positive,
        "max_iters": st.integers(0, 10**12),
        "learning_rate": st.floats(1e-3, 1e3) | st.integers(1, 9),
        "min_lr": st.floats(0, 1e-4),
        "beta1": st.floats(0, 1, exclude_max=True),
        "n_embd": st.integers(1, 64).map(lambda n: n * 12),
        "mlp": st.sampled_from(["gelu", "swiglu", "relu2"]),
        "bias": st.booleans(),
    },
)


@settings(max_examples=50)
@given(values)
def test_a_file_and_flags_and_python_make_the_same_config(tmp_path_factory, drawn):
    path = tmp_path_factory.getbasetemp() / "drawn.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in drawn.items()), encoding="utf-8")
    expected = TrainConfig(**drawn)
    assert train_config(str(path)) == expected
    assert train_config(*(f"--{key}={value}" for key, value in drawn.items())) == expected


# ------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("script", ["train", "sample", "prepare"])
def test_help_has_a_line_for_every_key(script, run_main):
    code, out, err = run_main(script, "--help")
    assert (code, err) == (0, "")
    assert out.startswith((ROOT / f"{script}.py").read_text(encoding="utf-8")[3:30])
    cls = class_of(script)
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING
        name = field.name.upper() if needed else f"--{field.name}"
        match = re.search(rf"^  {name} +(\S.+?)(?: \[(.+)\])?$", out, re.MULTILINE)
        assert match, f"{name} is missing"
        comment, default = match.groups()
        assert "=" not in comment.split(" ")[0]
        if needed:
            assert default is None
        else:
            assert ast.literal_eval(default) == field.default
    assert len(re.findall(r"^  \S", out, re.MULTILINE)) == len(dataclasses.fields(cls))


def class_of(script):
    import prepare
    import sample

    classes = {"sample": sample.SampleConfig, "prepare": prepare.PrepareConfig}
    return {**classes, "train": TrainConfig}[script]


def test_help_lists_the_choices_from_the_tables_that_the_code_uses(monkeypatch):
    monkeypatch.setitem(MLPS, "brand-new", MLPS["gelu"])
    listed = r"--mlp .*: gelu \| gelu_erf \| swiglu \| relu \| relu2 \| silu \| brand-new \["
    assert re.search(listed, help_text(TrainConfig))
    for key, table in TrainConfig.choices().items():
        assert re.search(rf"--{key} .*: {re.escape(' | '.join(table))} \[", help_text(TrainConfig))


def test_help_shows_the_default_of_the_class_itself():
    assert re.search(r"--vocab_size +set by the tokenizer \[None\]", help_text(TrainConfig))
