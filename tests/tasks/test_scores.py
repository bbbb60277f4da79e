"""Laws of the scores: they are those of scikit-learn and seqeval."""

import warnings

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
