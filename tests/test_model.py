"""The model: the whole GPT against its NumPy twin, and the laws that hold for every config."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import (
    attention_by,
    both_paths,
    encoder_configs,
    model_configs,
    pair_configs,
    random_model,
    random_tokens,
    scramble,
    seeds,
    to_torch,
    torch_seeded,
    weights_of,
)

from nanolm.layers import MLPS, POSITIONS, GatedMLP, ModelConfig
from nanolm.loss import cross_entropy
from nanolm.model import (
    GPT,
    Encoder,
    build_model,
    count_parameters,
    flops_per_token,
    masked_mean,
    positions_within,
)
from nanolm.sampling import generate

TINY = ModelConfig(vocab_size=17, block_size=11, n_layer=2, n_head=2, n_embd=6)
PAIR = dataclasses.replace(TINY, n_encoder_layer=1)


def tolerance(config):
    """Tables of angles and waves are made in fp32; everything else follows the model's dtype."""
    return 1e-9 if config.position == "learned" else 1e-5


def some_targets(config, seed, ignored=0.3):
    """Targets (2, block_size), a share of them ignored."""
    targets = random_tokens(config, seed + 1)
    return targets.masked_fill(
        torch.rand(targets.shape, generator=torch_seeded(seed)) < ignored, -1
    )


def some_batch(config, seed):
    """What forward takes, with all options of an encoder or a source, and targets."""
    targets = some_targets(config, seed)
    batch = {"ids": random_tokens(config, seed)}
    random = np.random.default_rng(seed)
    lengths = random.integers(1, config.block_size + 1, 2)
    if config.n_encoder_layer:
        batch["source"] = random_tokens(config, seed + 3)
        batch["source_mask"] = torch.from_numpy(np.arange(config.block_size) < lengths[:, None])
    if config.causal:
        return batch | {"targets": targets}
    batch["mask"] = torch.from_numpy(np.arange(config.block_size) < lengths[:, None])
    if config.n_types:
        batch["types"] = random_tokens(config, seed + 2) % config.n_types
    n_places = 1 if config.head == "text" else 5
    if config.head != "text" or random.random() < 0.5:
        batch["places"] = torch.from_numpy(random.integers(lengths[:, None], size=(2, n_places)))
    targets = targets[:, :n_places].clamp(max=max(2, len(config.labels) - 1))
    return batch | {"targets": targets}


def formula_of(model, batch):
    """The logits of a batch by the NumPy twin."""
    arrays = {name: array.numpy() for name, array in batch.items() if name != "targets"}
    return reference.transformer(weights_of(model), model.config, **arrays)


any_config = st.one_of(model_configs(), encoder_configs(), pair_configs())


# The whole


@both_paths
@given(st.one_of(encoder_configs(), pair_configs()), seeds)
@settings(deadline=None, max_examples=80)
def test_an_encoder_is_its_formula(path, config, seed):
    """With padding, types of tokens and places, for each head; and with a decoder behind it."""
    model, batch = random_model(config, seed), some_batch(config, seed)
    targets = batch.pop("targets")
    with attention_by(path):
        logits, _ = model(**batch)
        _, loss = model(**batch, targets=targets)
    expected = formula_of(model, batch)
    assert_close(logits, expected, tolerance(config))
    assert_close(loss, reference.cross_entropy(expected, targets.numpy()), tolerance(config))


@both_paths
@given(st.one_of(encoder_configs(), pair_configs()), seeds, st.data())
@settings(deadline=None, max_examples=60)
def test_padding_never_changes_a_token(path, config, seed, data):
    """Whatever stands there, bit for bit; and however much of it, up to the order of sums."""
    model, batch = random_model(config, seed), some_batch(config, seed)
    del batch["targets"]
    padded, own = ("source", "source_mask") if config.n_encoder_layer else ("ids", "mask")
    filling = torch.where(batch[own], batch[padded], (batch[padded] + 1) % 17)
    n = data.draw(st.integers(int(batch[own].sum(dim=1).max()), config.block_size))
    kept = ("ids", "places") if config.n_encoder_layer else ("places",)
    shorter = {k: t if k in kept else t[:, :n] for k, t in batch.items()}
    other = batch | {padded: filling}
    with attention_by(path):
        logits, changed, cut = (model(**which)[0] for which in (batch, other, shorter))
    assert torch.equal(logits, changed)
    assert_close(cut, logits, 1e-12)


def test_an_encoder_looks_ahead_and_a_decoder_does_not():
    ids = random_tokens(TINY, 0)
    later = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 17), dim=1)
    for causal in (False, True):
        model = random_model(dataclasses.replace(TINY, causal=causal), 0)
        assert isinstance(model, GPT if causal else Encoder)
        assert torch.equal(model(ids)[0][:, 0], model(later)[0][:, 0]) == causal


@both_paths
@given(model_configs(), seeds, st.data())
@settings(deadline=None, max_examples=40)
def test_logits_and_loss_are_their_formula(path, config, seed, data):
    model = random_model(config, seed)
    length = data.draw(st.integers(1, config.block_size))
    ids, targets = random_tokens(config, seed, length=length), some_targets(config, seed)
    targets = targets[:, :length]
    with attention_by(path):
        logits, no_loss = model(ids)
        no_logits, loss = model(ids, targets)
    assert no_loss is None
    assert no_logits is None
    assert loss.dtype == torch.float64  # narrower only where the model is
    expected = reference.transformer(weights_of(model), config, ids.numpy())
    assert_close(logits, expected, tolerance(config))
    assert_close(loss, reference.cross_entropy(expected, targets.numpy()), tolerance(config))


@both_paths
@given(model_configs(), seeds, st.data())
@settings(deadline=None, max_examples=30)
def test_changing_the_future_never_changes_the_past(path, config, seed, data):
    """Bit for bit: whatever stands at t + 1 and later, the logits up to t are the same."""
    model = scramble(GPT(config).eval(), seed)
    ids = random_tokens(config, seed)
    t = data.draw(st.integers(0, config.block_size - 2))
    changed = ids.clone()
    changed[:, t + 1 :] = (ids[:, t + 1 :] + 1) % config.vocab_size
    with attention_by(path):
        before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@both_paths
@given(any_config, seeds)
@settings(deadline=None, max_examples=25)
def test_the_gradient_is_the_slope_of_the_loss(path, config, seed):
    """Along random directions: (f(w + h d) - f(w - h d)) / 2h = gradient . d."""
    assume(config.mlp != "relu")  # it has a kink
    model, batch = random_model(config, seed), some_batch(config, seed)
    weights, generator, h = list(model.parameters()), torch_seeded(seed), 1e-6

    def loss_after(moves):
        for w, move in zip(weights, moves, strict=True):
            w.data += move
        return model(**batch)[1]

    with attention_by(path):
        gradient = torch.autograd.grad(model(**batch)[1], weights, materialize_grads=True)
        for _ in range(2):
            d = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
            above = loss_after([h * x for x in d])
            below = loss_after([-2 * h * x for x in d])
            loss_after([h * x for x in d])  # back again
            slope = sum((g * x).sum() for g, x in zip(gradient, d, strict=True))
            assert_close((above - below) / (2 * h), slope, 1e-4)


@both_paths
@given(any_config, seeds)
@settings(deadline=None, max_examples=25)
def test_half_precision_gives_an_fp32_loss_near_the_exact_one(path, config, seed):
    """Under autocast as in training, where matrices are bf16 and norms may answer in fp32."""
    model, batch = scramble(build_model(config), seed, scale=0.05), some_batch(config, seed)
    with attention_by(path):
        exact = model(**batch)[1]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch)[1]
        loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, exact, 0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@both_paths
@given(model_configs(), seeds, st.data())
@settings(deadline=None, max_examples=40)
def test_a_text_among_others_in_a_row_is_as_alone(path, config, seed, data):
    """Forward, and in what it adds to the gradient."""
    model, ids = random_model(config, seed), random_tokens(config, seed, batch=1)
    cuts = data.draw(st.sets(st.integers(1, config.block_size - 1)))
    ends = [*sorted(cuts), config.block_size]
    lengths = np.diff([0, *ends])
    segments = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))[None]
    targets = some_targets(config, seed, ignored=0.0)[:1]
    with attention_by(path):
        logits, _ = model(ids, segments=segments)
        _, loss = model(ids, targets, segments=segments)
        alone = [model(own)[0] for own in ids.split(lengths.tolist(), dim=1)]
    assert_close(logits, torch.cat(alone, dim=1), 1e-10)
    apart = cross_entropy(torch.cat(alone, dim=1), targets)
    gradients = [torch.autograd.grad(one, model.blocks.parameters()) for one in (loss, apart)]
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("position", POSITIONS)
def test_each_row_is_cut_into_texts_at_places_of_its_own(position):
    """Which are as alone: as many rows as heads, so that the two are not mixed up unseen."""
    model = random_model(dataclasses.replace(TINY, position=position, head_size=4), 0)
    ids, cuts = random_tokens(TINY, 0), ([4, 7], [9, 2])
    segments = torch.tensor([[0] * first + [1] * second for first, second in cuts])
    texts = [row.split(cut, dim=1) for row, cut in zip(ids.split(1), cuts, strict=True)]
    alone = [torch.cat([model(text)[0] for text in row], dim=1) for row in texts]
    assert_close(model(ids, segments=segments)[0], torch.cat(alone), 1e-10)


def test_positions_begin_anew_with_each_segment():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [3, 5, 5, 5, 5, 0]])
    assert positions_within(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_a_masked_mean_is_that_of_the_tokens_that_are_kept(seed):
    """Without a mask, of all."""
    random = np.random.default_rng(seed)
    x, mask = random.normal(size=(2, 5, 3)), random.random((2, 5)) < 0.5
    mask[:, random.integers(5)] = True
    expected = [row[kept].mean(axis=0, keepdims=True) for row, kept in zip(x, mask, strict=True)]
    assert_close(masked_mean(*to_torch(x, mask)), expected, 1e-12)
    assert_close(masked_mean(*to_torch(x), None), x.mean(axis=1, keepdims=True), 1e-12)


# An encoder and a decoder


@pytest.mark.parametrize("change", ["copy", "reverse"])
def test_an_encoder_decoder_learns_to_copy_and_to_reverse(change):
    """New texts too, and without a mistake (the first example of the Annotated Transformer)."""
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 4, "n_embd": 32}
    model = build_model(ModelConfig(n_encoder_layer=1, norm="rms", **shape))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))

    def draw(n):
        source = torch.randint(1, 11, (n, 8))
        return source, source if change == "copy" else source.flip(1)

    for step in range(400):
        source, answer = draw(32)
        begun = torch.nn.functional.pad(answer[:, :-1], (1, 0))
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 40, 2 * (1 - step / 400))
        model(begun, answer, source=source)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    source, answer = draw(200)
    begin = torch.zeros(200, 1, dtype=torch.int64)
    memory = model.eval().encode(source)
    steps = generate(model, begin, max_new_tokens=8, temperature=0.0, memory=memory)
    assert torch.equal(torch.stack(list(steps), dim=1), answer)


def test_the_targets_are_smoothed_in_training_alone():
    model = build_model(dataclasses.replace(PAIR, label_smoothing=0.3)).double()
    batch = some_batch(model.config, 0)
    targets = batch.pop("targets")
    logits = model(**batch)[0].detach().numpy()
    for smoothing in (0.3, 0.0):
        _, loss = model.train(smoothing > 0)(**batch, targets=targets)
        assert_close(loss, reference.cross_entropy(logits, targets.numpy(), smoothing), 1e-9)


# The cache


@both_paths
@given(st.one_of(model_configs(), pair_configs()), seeds, st.data())
@settings(deadline=None, max_examples=60)
def test_a_cache_changes_no_logit_however_the_sequence_is_split(path, config, seed, data):
    """Prefill in one piece or several, then single steps, or any mixture of them.

    Keys and values of a source are made once.
    """
    model, batch, cache, parts = random_model(config, seed), some_batch(config, seed), [], []
    batch.pop("targets")
    ids, cache = batch.pop("ids"), model.new_cache()
    with attention_by(path):
        whole, _ = model(ids, **batch)
        if config.n_encoder_layer:
            batch["memory"] = model.encode(batch.pop("source"), batch["source_mask"])
        while (start := cache[0].length) < config.block_size:
            end = start + data.draw(st.integers(1, config.block_size - start))
            parts.append(model(ids[:, start:end], cache=cache, **batch)[0])
            assert {layer.length for layer in cache[: config.n_layer]} == {end}
            assert {layer.length for layer in cache[config.n_layer :]} <= {config.block_size}
            if "memory" in batch:
                batch["memory"] = torch.full_like(batch["memory"], math.nan)
    assert_close(torch.cat(parts, dim=1), whole, 1e-10)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_context_longer_than_the_block_is_refused_and_leaves_the_cache_alone(position):
    model = GPT(dataclasses.replace(TINY, position=position, head_size=2))
    ids = random_tokens(TINY, 0, length=TINY.block_size + 1)
    with pytest.raises(ValueError, match=r"12 tokens.*block_size is 11"):
        model(ids)
    cache = model.new_cache()
    model(ids[:, :-2], cache=cache)
    with pytest.raises(ValueError, match=r"12 tokens.*block_size is 11"):
        model(ids[:, -2:], cache=cache)
    assert {layer.length for layer in cache} == {TINY.block_size - 1}
    model(ids[:, -1:], cache=cache)  # the last place
    assert {layer.max_length for layer in model.new_cache(3)} == {3}


# The weights


def expected_shapes(config):
    """The shape of every weight by name, from the config alone."""
    C, H, V = config.n_embd, config.n_hidden, config.vocab_size
    q, kv = config.n_head * config.head_size, config.n_kv_head * config.head_size
    matrices = {"attn.q": (q, C), "attn.k": (kv, C), "attn.v": (kv, C), "attn.out": (C, q)}
    matrices |= {"mlp.up": (H, C), "mlp.down": (C, H)}
    if issubclass(MLPS[config.mlp].func, GatedMLP):
        matrices["mlp.gate"] = (H, C)
    block = {f"{name}.weight": shape for name, shape in matrices.items()}
    if config.bias:
        block |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    if config.qk_norm:
        block |= {f"attn.{x}_norm.weight": (config.head_size,) for x in "qk"}
    norm = ["weight", "bias"] if config.bias and config.norm == "layer" else ["weight"]
    block |= {f"{x}_norm.{w}": (C,) for x in ("attn", "mlp") for w in norm}
    n = V if config.head == "tokens" else len(config.labels)
    shapes = {"tokens.weight": (V, C), "head.weight": (n, C)}
    if config.head != "tokens" or (config.bias and not config.causal):
        shapes["head.bias"] = (n,)
    if config.n_types:
        shapes["types.weight"] = (config.n_types, C)
    bert = not config.norm_first
    if not config.causal and (config.head == "text" or (config.head == "tokens" and bert)):
        shapes |= {"transform.0.weight": (C, C), "transform.0.bias": (C,)}
        if config.head == "tokens":
            shapes |= {f"transform.2.{w}": (C,) for w in norm}
    tower = {"positions.weight": (config.block_size, C)} if config.position == "learned" else {}
    if config.norm_first:
        tower |= {f"norm.{w}": (C,) for w in norm}
    elif not config.n_encoder_layer:
        tower |= {f"embedding_norm.{w}": (C,) for w in norm}
    crossing = {n.replace("attn", "cross"): s for n, s in block.items() if "attn" in n}
    for i in range(config.n_layer):
        across = crossing if config.n_encoder_layer else {}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in (block | across).items()}
    if config.n_encoder_layer:
        own = {"tokens.weight": (V, C), **tower}
        for i in range(config.n_encoder_layer):
            own |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        shapes |= {f"encoder.{name}": shape for name, shape in own.items()}
        shapes |= {"head.bias": (n,)} if config.bias else {}
    return shapes | tower


def expected_count(config):
    total = sum(math.prod(shape) for shape in expected_shapes(config).values())
    tied = config.tie_embeddings and config.head == "tokens"
    return total - (tied + (config.n_encoder_layer > 0)) * config.vocab_size * config.n_embd


@given(any_config)
@settings(deadline=None, max_examples=60)
def test_the_config_alone_says_which_weights_there_are(config):
    model = build_model(config)
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    assert shapes == expected_shapes(config)
    assert count_parameters(model) == expected_count(config)


def test_the_default_config_with_biases_is_gpt_2():
    """It has as many weights as the published model (Radford et al. 2019)."""
    assert expected_count(ModelConfig(bias=True)) == 124_439_808


@pytest.mark.parametrize("tie", [False, True])
def test_tied_embeddings_are_one_tensor_and_stay_one(tie):
    """Also after loading and moving, and training changes them at once."""
    config = dataclasses.replace(TINY, tie_embeddings=tie)
    model = GPT(config)
    model.load_state_dict(scramble(GPT(config), 0).state_dict())
    for same in (model, model.to(torch.float64)):
        assert (same.head.weight is same.tokens.weight) == tie
    model(random_tokens(config, 0), some_targets(config, 0))[1].backward()
    with torch.no_grad():
        model.head.weight += 1
    assert torch.equal(model.head.weight, model.tokens.weight) == tie


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("tie", [False, True])
def test_weights_start_as_gpt_2_draws_them(mlp, tie):
    """Normal with std 0.02, and smaller by 1 / sqrt(2 n_layer) where they write the residual."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=101, block_size=67, n_layer=3, n_head=4, n_embd=64, mlp=mlp, bias=True,
        tie_embeddings=tie, qk_norm=True,
    )  # fmt: skip
    for name, w in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert torch.equal(w, torch.zeros_like(w)), name
        elif "norm" in name:
            assert torch.equal(w, torch.ones_like(w)), name
        else:
            residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            assert abs(w.std() / std - 1) < 0.05, name
            assert abs(w.mean()) < std / 10, name


def test_the_more_layers_write_the_residual_the_smaller_each_starts():
    """Those of one stream: the encoder's has two in a block, the decoder's three."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(PAIR, n_head=8, n_embd=128))
    for tower, n in ((model, 3 * PAIR.n_layer), (model.encoder, 2 * PAIR.n_encoder_layer)):
        for block in tower.blocks:
            for layer in block.residual_writers():
                assert abs(layer.weight.std() / (0.02 / math.sqrt(n)) - 1) < 0.05


@given(model_configs(vocab_size=101))
@settings(deadline=None, max_examples=20)
def test_a_new_model_is_as_surprised_as_a_blind_guess(config):
    torch.manual_seed(0)
    model = GPT(config)
    _, loss = model(random_tokens(config, 0), some_targets(config, 0))
    assert abs(loss - math.log(101)) < 0.1


# Dropout


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, dropout=0.5))
    same = GPT(TINY)
    same.load_state_dict(model.state_dict())
    ids = random_tokens(TINY, 0)
    assert torch.equal(model.eval()(ids)[0], same.eval()(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_dropout_falls_on_the_embeddings_and_on_what_each_block_adds():
    """Where everything is dropped, a block adds nothing, and a model has nothing to add to."""
    model = scramble(GPT(dataclasses.replace(TINY, dropout=0.5, bias=True)), 0)
    assert [block.attn.dropout for block in model.blocks] == [0.5, 0.5]
    x = torch.randn(2, 11, 6)
    for block in model.blocks:
        assert block.dropout.p == 0.5
        block.dropout.p = 1.0
        assert torch.equal(block(x), x)
    assert model.dropout.p == 0.5
    model.dropout.p = 1.0
    logits, _ = model(random_tokens(TINY, 0))
    assert torch.equal(logits, model.head(model.norm(torch.zeros(2, 11, 6))))


@pytest.mark.parametrize(
    ("position", "tied", "looked_up"),
    [("rotary", True, 0), ("rotary", False, 11 * 10), ("learned", True, 7 * 10)],
)
def test_the_cost_of_a_token_is_counted_from_the_matrix_products(position, tied, looked_up):
    """2 operations per weight forward, 4 backward; 2 products of T x hs per head, thrice.

    A table that is only looked up costs nothing.
    """
    shape = {"vocab_size": 11, "block_size": 7, "n_layer": 3, "n_head": 5, "n_embd": 10}
    model = GPT(ModelConfig(**shape, position=position, tie_embeddings=tied))
    n = count_parameters(model) - looked_up
    assert flops_per_token(model) == 6 * n + 3 * 5 * (2 + 4) * 2 * (7 * 2)


def test_a_token_of_a_source_or_of_an_answer_costs_half_of_both_together():
    """One passes the encoder, and the other the decoder, with its two attentions of a block."""
    model = build_model(dataclasses.replace(PAIR, position="rotary", head_size=2))
    products = 6 * count_parameters(model)
    attentions = (PAIR.n_encoder_layer + 2 * PAIR.n_layer) * 2 * (2 + 4) * 2 * (11 * 2)
    assert flops_per_token(model) == (products + attentions) / 2
