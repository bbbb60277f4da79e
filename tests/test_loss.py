"""Laws of the loss: the formula, and its twin that never holds all logits."""

import dataclasses
import inspect

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import seeds, torch_seeded

from nanolm import loss as chapter
from nanolm.layers import ModelConfig
from nanolm.loss import cross_entropy, projected_cross_entropy
from nanolm.model import GPT

V, C = 17, 5
WIDE = ModelConfig(vocab_size=1009, block_size=31, n_layer=1, n_head=1, n_embd=4)
SHARES = st.sampled_from([0.0, 0.5, 0.9, 1.0])  # of targets that are ignored
OPTIONS = st.fixed_dictionaries(
    {"smoothing": st.sampled_from([0.0, 0.1])}
)  # the options that both forms of the loss take, drawn below
CHUNKS = st.sampled_from([1, V, 3 * V, 7 * V + 2, 22 * V - 1])  # of 22 rows of V logits


def random_targets(seed: int, ignored: float) -> torch.Tensor:
    """Targets (2, 11), a share of them -1."""
    random = np.random.default_rng(seed)
    targets = random.integers(V, size=(2, 11))
    return torch.from_numpy(np.where(random.random(targets.shape) < ignored, -1, targets))


def random_ends(seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors (2, 11, C) and the matrix (V, C) that the logits are the product of."""
    random = torch_seeded(seed)
    x, weight = (torch.randn(shape, generator=random) * 2 for shape in ((2, 11, C), (V, C)))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@given(seeds, st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([1.0, 100.0]), OPTIONS)
@settings(deadline=None, max_examples=20)
def test_cross_entropy_is_its_formula(seed, ignored, scale, options):
    logits = np.random.default_rng(seed).normal(size=(2, 11, V)) * scale
    targets = random_targets(seed, ignored)
    loss = cross_entropy(torch.from_numpy(logits), targets, **options)
    assert_close(loss, reference.cross_entropy(logits, targets.numpy(), **options), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_of_no_target_is_exactly_0_with_a_gradient_of_0(dtype):
    logits = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_half_precision_logits_is_computed_in_fp32(dtype):
    """A sum over many tokens would lose most of its digits, in fp16 overflow."""
    logits = (torch.randn(2, 3, 5003, generator=torch_seeded(0)) * 4).to(dtype)
    targets = torch.tensor([[0, 7, -1], [4999, -1, 3]])
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, reference.cross_entropy(logits.double().numpy(), targets.numpy()))


# In chunks


@given(OPTIONS)
@settings(max_examples=1)
def test_both_forms_of_the_loss_take_the_same_options_and_all_are_drawn_here(options):
    """Label smoothing in one of them alone would act on small models, and on no large one."""

    def names(form, *others):
        return set(inspect.signature(form).parameters) - set(others)

    plain = names(cross_entropy, "logits", "targets")
    assert plain == names(projected_cross_entropy, "x", "weight", "targets", "chunk", "bias")
    assert plain == set(options)


@given(seeds, SHARES, CHUNKS)
@settings(deadline=None, max_examples=20)
def test_a_bias_is_added_to_the_logits_of_every_chunk(seed, ignored, chunk):
    x, weight = random_ends(seed)
    bias = torch.randn(len(weight), generator=torch_seeded(seed), dtype=x.dtype)
    ends, targets = [x, weight, bias.requires_grad_()], random_targets(seed, ignored)
    found = projected_cross_entropy(x, weight, targets, chunk, bias=bias)
    expected = cross_entropy(x @ weight.T + bias, targets)
    assert_close(found, expected, 1e-12)
    gradients = (torch.autograd.grad(loss, ends) for loss in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-12)


@given(seeds, SHARES, CHUNKS, OPTIONS)
@settings(deadline=None, max_examples=40)
def test_the_loss_in_chunks_is_the_formula_of_all_logits(seed, ignored, chunk, options):
    x, weight = random_ends(seed)
    targets = random_targets(seed, ignored)
    logits = (x @ weight.T).detach().numpy()
    expected = reference.cross_entropy(logits, targets.numpy(), **options)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = projected_cross_entropy(x, weight, targets, chunk, **options)
        assert_close(found, expected, 1e-12)


@given(
    seeds, SHARES, CHUNKS, OPTIONS, st.sampled_from([(True, True), (True, False), (False, True)])
)
@settings(deadline=None, max_examples=40)
def test_the_gradients_in_chunks_are_those_of_all_logits(seed, ignored, chunk, options, wanted):
    """Whichever of the two is asked for, and whatever the loss is multiplied by afterwards."""
    ends, targets = random_ends(seed), random_targets(seed, ignored)
    for end, needed in zip(ends, wanted, strict=True):
        end.requires_grad_(needed)
    asked = [end for end in ends if end.requires_grad]
    whole = cross_entropy(ends[0] @ ends[1].T, targets, **options) * -0.7
    parts = projected_cross_entropy(*ends, targets, chunk, **options) * -0.7
    for a, b in zip(*(torch.autograd.grad(loss, asked) for loss in (parts, whole)), strict=True):
        assert_close(a, b, 1e-12)


def test_rare_tokens_keep_their_gradient_in_float16():
    """Theirs is tiny, and exists in float16 only while the loss is scaled up: so no chunks there.

    A chunk makes its gradients before it can know the scale.
    """
    random = torch_seeded(0)
    x = torch.randn(8, 512, 16, generator=random) * 0.3
    weight = torch.randn(5003, 16, generator=random) * 0.3
    targets = torch.randint(100, (8, 512), generator=random)  # the other tokens never come
    gradients = []
    for enabled in (False, True):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            loss = projected_cross_entropy(x, leaf, targets, chunk=100 * 5003)
        (loss * 2**16).backward()
        gradients.append(leaf.grad[100:])
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_follow_autocast_and_sum_up_in_fp32(dtype):
    x, weight = random_ends(0, torch.float32)
    targets = random_targets(0, 0.3)
    with torch.autocast("cpu", dtype=dtype):
        whole = cross_entropy(torch.nn.functional.linear(x, weight), targets)
        parts = projected_cross_entropy(x, weight, targets, 4 * V)
    assert parts.dtype == torch.float32
    assert_close(parts, whole, 1e-6)
    for a, b in zip(
        *(torch.autograd.grad(loss, (x, weight)) for loss in (parts, whole)), strict=True
    ):
        assert a.dtype == torch.float32
        assert_close(a, b, 2 * torch.finfo(dtype).eps)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    """An evaluation must not pay for training."""
    x, weight = random_ends(0)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    with torch.no_grad():
        projected_cross_entropy(x, weight, random_targets(0, 0.3), 4 * V)
    with pytest.raises(TypeError):
        projected_cross_entropy(x, weight, random_targets(0, 0.3), 4 * V)


def test_a_second_backward_pass_raises_instead_of_giving_something_else():
    loss = projected_cross_entropy(*random_ends(0), random_targets(0, 0.3), 4 * V)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_model_trains_without_ever_holding_its_logits(monkeypatch, tie_embeddings):
    """And to the same gradients as with them."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(WIDE, tie_embeddings=tie_embeddings))
    ids = torch.randint(1009, (3, 32))
    ids, targets = ids[:, :-1], ids[:, 1:]
    gradients, largest = [], []
    for chunk in (10**6, 2**13):
        monkeypatch.setitem(chapter.CHUNK, "cpu", chunk)
        with Sizes() as sizes:
            model(ids, targets)[1].backward()
        largest.append(sizes.largest)
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert largest[0] == 3 * 31 * 1009
    assert largest[1] <= 2**13
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # as torch.compile itself does
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_the_same_loss_and_gradients_in_chunks(monkeypatch, dtype):
    monkeypatch.setitem(chapter.CHUNK, "cpu", 2**13)
    torch.manual_seed(0)
    model = GPT(WIDE)
    ids = torch.randint(1009, (3, 32))
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-5 if dtype == torch.float32 else 1e-2)
