"""Laws of exported encoders in transformers' pipelines: they answer as sample.py does."""

import json
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import TEXT, TINY, write_texts_of_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import ENCODERS, PAIRS, SMALL, assert_equal, save_theirs, shape_of, their_config
from strategies import random_model
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from nanolm.hub.models import export_model, load_pretrained
from nanolm.hub.tokenizers import read_tokenizer
from nanolm.layers import ModelConfig
from nanolm.model import Transformer
from nanolm.runs.load import usual_task
from nanolm.text.bpe_tokenizer import BPETokenizer
from nanolm.text.tokenizer import Tokenizer, mask_of, with_mask

WORDS = ["little", "wolves", "met", "foxes,", "and", "ran."]
PIPELINES = {"tokens": "fill-mask", "text": "text-classification", "words": "token-classification"}
OPTIONS = {"tokens": {"top_k": 5}, "text": {"top_k": None}, "words": {"ignore_labels": []}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One of ours, and one of BERT's kind, which is a file vocab.txt."""
    folder = tmp_path_factory.mktemp("bert")
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator([TEXT], vocab_size=200, min_frequency=1, show_progress=False)
    trained.save_model(str(folder))
    return {"BPE": with_mask(BPETokenizer.train([TEXT], 300)), "BERT": read_tokenizer(folder)}


def as_printed(found: list, words: list[str], head: str, tokenizer) -> str:
    """What a pipeline has found, written as sample.py writes it."""
    if head == "text":
        return "  ".join(f"{one['label']} {one['score']:.1%}" for one in found)
    if head == "tokens":
        several = found if isinstance(found[0], list) else [found]
        return "\n".join(
            "  ".join(f"{tokenizer.decode([one['token']])!r} {one['score']:.1%}" for one in each)
            for each in several
        )
    word_at = dict(zip(accumulate([0, *(len(word) + 1 for word in words)]), words, strict=False))
    firsts = {one["start"]: one for one in reversed(found)}  # a blank can be a token of its own
    return "\n".join(
        f"{word}\t{firsts[start]['entity']} {firsts[start]['score']:.1%}"
        for start, word in word_at.items()
    )


def test_bert_is_finetuned_on_labelled_texts_and_handed_on(workplace, run_main):
    """Its folder has a vocab.txt, as older ones do; the head is fresh."""
    write_texts_of_tasks()
    text = Path("kinds.csv").read_text()
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator([text], vocab_size=200, min_frequency=1, show_progress=False)
    keys = SMALL | {"vocab_size": trained.get_vocab_size()}
    save_theirs(Path("theirs"), their_config("bert", keys))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("theirs", name).unlink()
    trained.save_model("theirs")
    words = ["--task=classification", "--input=kinds.csv", "--tokenizer=theirs"]
    assert run_main("prepare", "kinds", *words)[::2] == (0, "")
    flags = [*TINY, "--task=classification", "--dataset=kinds", "--init_from=theirs"]
    flags += ["--out_dir=out/kinds", "--max_iters=150", "--eval_interval=150", "--batch_size=16"]
    code, out, _ = run_main("train", *flags, "--learning_rate=0.005")
    assert code == 0
    assert "head      fresh: 2 labels" in out
    code, out, _ = run_main("nanolm/runs/export", "out/kinds", "there")
    assert out.endswith("written to there as BertForSequenceClassification\n")
    theirs = pipeline("text-classification", "there", device="cpu", top_k=None)
    for text, label in [("3 and 3 wolfs", "few"), ("4 and 59 owls", "many")]:
        words = ["--out_dir=out/kinds", f"--start={text}", "--dtype=float32"]
        code, out, _ = run_main("sample", *words)
        assert out.startswith(f"{label} ")
        assert as_printed(theirs([text])[0], [], "text", None) in out


def random_encoder(name: str, tokenizer: Tokenizer, seed: int) -> Transformer:
    """A small one of that name, in float32."""
    keys = SMALL | shape_of(name) | {"vocab_size": tokenizer.vocab_size, "block_size": 64}
    keys |= {} if name.startswith("eurobert") else {"head_size": 6, "n_kv_head": 2}
    return random_model(ModelConfig(**keys), seed).float()


@pytest.mark.parametrize("kind", ["BPE", "BERT"])
@pytest.mark.parametrize("name", ["bert-text", "eurobert-text"])
def test_a_pipeline_answers_to_a_pair_as_sample_does(name, kind, tokenizers, tmp_path):
    tokenizer = tokenizers[kind]
    model = random_encoder(name, tokenizer, seed=0)
    export_model(model, tokenizer, tmp_path / "there")
    theirs = pipeline("text-classification", str(tmp_path / "there"), device="cpu", top_k=None)
    found = theirs({"text": "little wolves", "text_pair": "met foxes"})
    text = f"little wolves{tokenizer.decode([tokenizer.end_of_text])}met foxes"
    [answer] = usual_task(model.config, tokenizer).answer(model, tokenizer, text)
    assert as_printed(found, [], "text", tokenizer) == "".join(answer)


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # Windows' editors begin a file with it
@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_of_pieces_is_read_with_its_rule_for_capitals(lower, mark, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Cat", "cat"]
    (tmp_path / "vocab.txt").write_text(mark + "\n".join(pieces))
    settings = json.dumps({"do_lower_case": lower})
    (tmp_path / "tokenizer_config.json").write_text(mark + settings)
    assert read_tokenizer(tmp_path).encode("Cat[PAD]", allowed_special="all")[0] == 6 - (not lower)
    assert read_tokenizer(tmp_path).decode([0]) == "[PAD]"


@pytest.mark.parametrize("kind", ["BPE", "BERT"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_pipeline_answers_as_sample_does(name, kind, tokenizers):
    tokenizer, shape = tokenizers[kind], shape_of(name)
    mask = tokenizer.decode([mask_of(tokenizer)])

    @settings(max_examples=3)
    @given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.integers(0, 99))
    def law(words, seed):
        if shape["head"] == "tokens":
            words = [*words, mask, *words[:2], mask][: seed % 2 + len(words) + 1]
        model = random_encoder(name, tokenizer, seed)
        text = " ".join(words)
        with TemporaryDirectory() as place:
            export_model(model, tokenizer, Path(place) / "there")
            assert_equal(load_pretrained(Path(place) / "there"), (model, tokenizer))
            config = json.loads(Path(place, "there", "config.json").read_text())
            assert config["mask_token_id"] == mask_of(tokenizer)
            head = shape["head"]
            theirs = pipeline(PIPELINES[head], f"{place}/there", device="cpu", **OPTIONS[head])
            found = theirs([text])[0] if head == "text" else theirs(text)
        [answer] = usual_task(model.config, tokenizer).answer(model, tokenizer, text)
        assert as_printed(found, words, head, tokenizer) == "".join(answer)

    law()


@pytest.mark.parametrize("name", PAIRS)
def test_an_exported_encoder_decoder_answers_as_sample_does(name, tokenizers, tmp_path):
    """To the text of their tokenizer, greedily and by beams; they have no pipeline for it."""
    tokenizer = tokenizers["BPE"]
    keys = SMALL | shape_of(name) | {"vocab_size": tokenizer.vocab_size, "n_encoder_layer": 1}
    keys |= {"start_id": tokenizer.end_of_text, "n_kv_head": 2, "head_size": 6, "mlp": "relu"}
    for seed in range(4):
        model = random_model(ModelConfig(**keys), seed).float()
        folder = tmp_path / str(seed)
        export_model(model, tokenizer, folder)
        theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        text = AutoTokenizer.from_pretrained(folder)
        for beams in (1, 3):
            found = theirs.generate(
                **text("little wolves met", return_tensors="pt"),
                max_new_tokens=12,
                num_beams=beams,
                do_sample=False,
            )
            options = {"max_new_tokens": 12, "temperature": 0.0, "num_beams": beams}
            task = usual_task(model.config, tokenizer)
            [answer] = task.answer(model, tokenizer, "little wolves met", **options)
            assert "".join(answer) == text.decode(found[0], skip_special_tokens=True)
