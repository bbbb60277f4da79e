"""Laws of the scores: they are those of scikit-learn, seqeval, sacrebleu, and others."""

import math
import random
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.tasks import scores

MANY = settings(max_examples=1000)
labels = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30),
    )
)
sentences = st.lists(
    st.lists(
        st.tuples(*[st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])] * 2),
        min_size=1,
        max_size=9,
    ),
    min_size=1,
    max_size=5,
)


def matrix_of(pairs, n: int) -> np.ndarray:
    columns = np.array(pairs, int).reshape(-1, 2)
    return scores.confusion(columns[:, 0], columns[:, 1], n)


@MANY
@given(labels)
def test_labels_score_as_in_scikit_learn(drawn):
    from sklearn import metrics

    n, pairs = drawn
    matrix = matrix_of(pairs, n)
    truth, guess = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if not pairs:
        assert scores.accuracy(matrix) == scores.macro_f1(matrix) == scores.matthews(matrix) == 0
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels that do not occur, which score 0
        assert np.array_equal(matrix, metrics.confusion_matrix(truth, guess, labels=range(n)))
        theirs = metrics.precision_recall_fscore_support(
            truth, guess, labels=range(n), zero_division=0
        )[:3]
        assert np.allclose(scores.label_scores(matrix), theirs)
        assert scores.accuracy(matrix) == pytest.approx(metrics.accuracy_score(truth, guess))
        micro = metrics.f1_score(truth, guess, average="micro")
        assert scores.accuracy(matrix) == pytest.approx(micro)
        macro = metrics.f1_score(truth, guess, average="macro", zero_division=0)
        assert scores.macro_f1(matrix) == pytest.approx(macro)
        mcc = metrics.matthews_corrcoef(truth, guess)
        assert scores.matthews(matrix) == pytest.approx(mcc, abs=1e-9)


@MANY
@given(sentences)
def test_names_score_as_in_seqeval(drawn):
    from seqeval import metrics
    from seqeval.scheme import IOB2

    truth, guess = ([[pair[i] for pair in sentence] for sentence in drawn] for i in (0, 1))
    counts = sum(map(scores.span_counts, truth, guess))
    options = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = (metrics.precision_score, metrics.recall_score, metrics.f1_score)
        theirs = [score(truth, guess, **options) for score in kinds]
    assert np.allclose(scores.precision_recall_f1(*counts), theirs)


@given(labels, st.integers(0, 30))
def test_counts_add_up_over_batches(drawn, cut):
    n, pairs = drawn
    parts = matrix_of(pairs[:cut], n) + matrix_of(pairs[cut:], n)
    assert np.array_equal(parts, matrix_of(pairs, n))


@given(labels)
def test_scores_follow_from_their_definitions(drawn):
    """The twin in plain Python, pair by pair."""
    n, pairs = drawn
    precision, recall, f1 = scores.label_scores(matrix_of(pairs, n))
    for label in range(n):
        hits = sum(pair == (label, label) for pair in pairs)
        guessed, wanted = (sum(pair[i] == label for pair in pairs) for i in (1, 0))
        p, r = hits / guessed if guessed else 0, hits / wanted if wanted else 0
        assert (precision[label], recall[label]) == pytest.approx((p, r))
        assert f1[label] == pytest.approx(2 * p * r / (p + r) if p + r else 0)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", set()),
        ("O O", set()),
        ("B-A I-A O B-B", {("A", 0, 2), ("B", 3, 4)}),
        ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
        ("I-A I-A", set()),
        ("B-A I-B I-A", {("A", 0, 1)}),
    ],
)
def test_a_name_begins_with_b_and_ends_where_its_kind_does(tags, found):
    assert scores.spans(tags.split()) == found


# ------------------------------------------------------------------------------------------
# Texts

MARKED = """the a an Turn on off light. 3.5 3-4 1,000 don't &amp; &lt;b&gt; <skipped> Haus, über
    grün (x) [y] e-mail ... - 'q' "z" A B 日本語 naïve İ e\u0301"""
PIECES = [*MARKED.split(), "", "\n", "-\n", "\t", "\xa0", "\u2028"]
any_text = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=9).map(" ".join)
pairs_of_texts = st.lists(st.tuples(any_text, any_text), min_size=1, max_size=5)


def corpus(seed: int) -> tuple[list[str], list[str]]:
    """Some texts and those that are wanted, which share much with them or nothing."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(draw.choices(PIECES, k=draw.randint(0, longest)))

    def like(other: str) -> str:
        kept = [word for word in other.split(" ") if draw.random() < 0.7]
        return draw.choice([other, text(9), " ".join(kept) + text(3)])

    wanted = [text(12) for _ in range(draw.choice([1, 1, 2, 5, 20]))]
    return [like(other) for other in wanted], wanted


def scores_of(found, wanted) -> dict[str, float]:
    return scores.text_scores(sum(map(scores.text_counts, found, wanted)))


def check_against_others(found: list[str], wanted: list[str]) -> None:
    """Compare with sacrebleu as it is by default, with rouge_score, and with torchmetrics."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    from torchmetrics.functional.text import squad

    rouge = map(RougeScorer(["rougeL"]).score, wanted, found)
    theirs = squad(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(found)],
        [
            {"id": str(i), "answers": {"answer_start": [0], "text": [text]}}
            for i, text in enumerate(wanted)
        ],
    )
    assert scores_of(found, wanted) == pytest.approx(
        {
            "bleu": sacrebleu.corpus_bleu(found, [wanted], force=True).score,  # force: no warning
            "chrf": sacrebleu.corpus_chrf(found, [wanted]).score,
            "rouge_l": np.mean([score["rougeL"].fmeasure for score in rouge]),
            "exact": theirs["exact_match"].item() / 100,
            "f1": theirs["f1"].item() / 100,
        },
        rel=1e-5,
        abs=1e-7,
    )


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_texts_score_as_by_sacrebleu_rouge_score_and_squad(n):
    for seed in range(n):
        check_against_others(*corpus(seed))


@settings(max_examples=50)
@given(pairs_of_texts)
def test_any_texts_score_so(pairs):
    """Whatever stands in them, and where one is empty."""
    check_against_others(*map(list, zip(*pairs, strict=True)))


@given(pairs_of_texts, st.randoms())
def test_counts_of_texts_add_up_in_any_order(pairs, draw):
    counts = [scores.text_counts(*pair) for pair in pairs]
    draw.shuffle(counts)
    cut = draw.randint(0, len(counts))
    parts = sum(counts[:cut]) + sum(counts[cut:])
    assert scores.text_scores(parts) == pytest.approx(scores_of(*zip(*pairs, strict=True)))
    assert parts[-1] == len(pairs)


@given(st.lists(any_text, min_size=1, max_size=5))
def test_the_wanted_texts_themselves_score_in_full(texts):
    texts += ["four words or more"]
    found = scores_of(texts, texts)
    share = np.mean(
        [bool(scores.plain_words(text)) for text in texts]
    )  # without words, ROUGE is 0
    assert found == pytest.approx(
        {"bleu": 100, "chrf": 100, "rouge_l": share, "exact": 1, "f1": 1}
    )


def runs(items, n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu_by_the_paper(pairs) -> float:
    """Papineni et al. 2002, section 2.3, of lists of words that share runs of each length."""
    p = []
    for n in range(1, 5):
        clipped = sum(
            min(count, runs(wanted, n)[run])
            for found, wanted in pairs
            for run, count in runs(found, n).items()
        )
        p.append(clipped / sum(runs(found, n).total() for found, _ in pairs))
    c, r = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    brevity = 1 if c > r else math.exp(1 - r / c)
    return 100 * brevity * math.exp(sum(math.log(x) for x in p) / 4)


def chrf_by_the_paper(found: str, wanted: str, beta: float = 2) -> float:
    """Popović 2015, equation 1, with the means over the lengths of runs."""
    shared = [(runs(found, n) & runs(wanted, n)).total() for n in range(1, 7)]
    chrp, chrr = (
        np.mean([k / (len(text) - n) for n, k in enumerate(shared)]) for text in (found, wanted)
    )
    return 100 * (1 + beta**2) * chrp * chrr / (beta**2 * chrp + chrr)


def lcs(one, other) -> int:
    """Lin 2004: the longest common subsequence, by its recursion."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return lcs(one[:-1], other[:-1]) + 1
    return max(lcs(one[:-1], other), lcs(one, other[:-1]))


words = st.lists(st.sampled_from("abcd"), max_size=7)


@given(st.lists(st.tuples(words, words), max_size=3))
def test_bleu_follows_from_its_paper(pairs):
    pairs = [*pairs, (list("abcda"), list("xabcd"))]  # runs of four are shared
    texts = [[" ".join(pair[i]) for pair in pairs] for i in (0, 1)]
    assert scores_of(*texts)["bleu"] == pytest.approx(bleu_by_the_paper(pairs))


def test_a_run_that_is_never_shared_counts_as_half_a_match_and_the_next_as_a_quarter():
    """Lin & Och 2004: precisions 2/4, 1/3, 1/2 of 2 and 1/4 of 1."""
    found, wanted = "a b x y", "a b c d"
    wanted_score = 100 * (2 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** (1 / 4)
    assert scores_of([found], [wanted])["bleu"] == pytest.approx(wanted_score)


@given(st.text("ab", min_size=6, max_size=12), st.text("abc", min_size=6, max_size=12))
def test_chrf_follows_from_its_paper(found, wanted):
    found, wanted = f"{found}a", f"{wanted}a"  # a character is shared
    ours = scores_of([f"{found[:3]} {found[3:]}"], [wanted])["chrf"]  # blanks do not count
    assert ours == pytest.approx(chrf_by_the_paper(found, wanted))


@given(words, words)
def test_rouge_l_follows_from_its_paper(found, wanted):
    n = lcs(found, wanted)
    assert scores.common_length(found, wanted) == n
    recall, precision = n / max(1, len(wanted)), n / max(1, len(found))
    f = 2 * recall * precision / (recall + precision) if n else 0
    ours = scores_of([" ".join(found)], [" ".join(wanted)])["rouge_l"]
    assert ours == pytest.approx(f)


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "f1"),
    [
        ("The wolf!", "a wolf", 1, 1),
        ("wolf fox", "fox owl wolf", 0, 0.8),
        ("wolf wolf", "wolf", 0, 2 / 3),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "wolf", 0, 0),
    ],
)
def test_an_answer_is_right_without_articles_marks_and_capitals(found, wanted, exact, f1):
    ours = scores_of([found], [wanted])
    assert (ours["exact"], ours["f1"]) == pytest.approx((exact, f1))
