"""The families: how Hugging Face's transformers spell the models that ModelConfig can express.

Each is a table of what they call our keys in config.json, and our weights in their files; what
nanolm has no key for has to be as it is here. The functions go both ways.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, get_type_hints

import torch

from nanolm.hub.names import require
from nanolm.layers import ModelConfig
from nanolm.model import build_model
from nanolm.system.config import coerce

LARGEST = 2**24  # of any number of channels, tokens, layers
OURS = "nanolm"  # the key of config.json under which an export keeps its ModelConfig


@dataclass(frozen=True)
class Head:
    """What some of a family's models end in."""

    architecture: str  # the class of such a model
    weights: str  # a table of modules, as below, by names without a prefix
    required: dict[str, Any] = field(default_factory=dict)  # as that of a family


@dataclass(frozen=True, kw_only=True)
class Family:
    """How transformers spells a kind of models."""

    heads: dict[str, Head]  # by what ModelConfig calls them
    shape: dict[str, Any]  # what the ModelConfig of each of its models has
    keys: dict[str, str]  # keys of ModelConfig -> its own
    defaults: dict[str, Any]  # what its keys mean where they are missing; others must be there
    required: dict[str, Any]  # further keys of its own, and the one value that we have, too
    biases: tuple[str, ...]  # keys of its own that give some modules a bias
    dropout: tuple[str, ...]  # keys of its own for our dropout
    prefix: str  # of the names of all weights but those of the head; some files leave it out
    weights: str  # a table of modules, as below
    splits_evenly: bool = True  # n_head has to divide n_embd
    alike: dict[str, str] = field(default_factory=dict)  # keys that have to be as another is
    activations: dict[str, str] = field(default_factory=dict)  # its -> our names of MLPs


DECODER = {"causal": True, "norm_first": True, "n_types": 0, "n_encoder_layer": 0}
DECODER |= {"scale_embeddings": False}

# A row for each module: our name (N is the number of the layer; q+k+v are stacked into one), its
# own, and remarks: whether it has a bias (always, or by which key), whether its weight is
# transposed, whether its bias is a row of a matrix. A row of a module that a model does not have
# is passed over.

GPT2 = Family(
    heads={"tokens": Head("GPT2LMHeadModel", "head lm_head")},
    shape={**DECODER, "norm": "layer", "position": "learned", "mlp": "gelu", "qk_norm": False},
    keys={
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_hidden": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    required={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    biases=(),
    dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    prefix="transformer.",
    weights="""
        tokens                 wte
        positions              wpe
        blocks.N.attn_norm     h.N.ln_1           bias
        blocks.N.attn.q+k+v    h.N.attn.c_attn    bias  transposed
        blocks.N.attn.out      h.N.attn.c_proj    bias  transposed
        blocks.N.mlp_norm      h.N.ln_2           bias
        blocks.N.mlp.up        h.N.mlp.c_fc       bias  transposed
        blocks.N.mlp.down      h.N.mlp.c_proj     bias  transposed
        norm                   ln_f               bias
    """,
)

LLAMA = Family(
    heads={"tokens": Head("LlamaForCausalLM", "head lm_head")},
    shape={**DECODER, "norm": "rms", "position": "rotary", "mlp": "swiglu", "qk_norm": False},
    keys={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_size": "head_dim",
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    required={"hidden_act": "silu"},
    biases=("attention_bias", "mlp_bias"),
    dropout=("attention_dropout",),
    prefix="model.",
    weights="""
        tokens                 embed_tokens
        blocks.N.attn_norm     layers.N.input_layernorm
        blocks.N.attn.q        layers.N.self_attn.q_proj     attention_bias
        blocks.N.attn.k        layers.N.self_attn.k_proj     attention_bias
        blocks.N.attn.v        layers.N.self_attn.v_proj     attention_bias
        blocks.N.attn.out      layers.N.self_attn.o_proj     attention_bias
        blocks.N.attn.q_norm   layers.N.self_attn.q_norm
        blocks.N.attn.k_norm   layers.N.self_attn.k_norm
        blocks.N.mlp_norm      layers.N.post_attention_layernorm
        blocks.N.mlp.gate      layers.N.mlp.gate_proj        mlp_bias
        blocks.N.mlp.up        layers.N.mlp.up_proj          mlp_bias
        blocks.N.mlp.down      layers.N.mlp.down_proj        mlp_bias
        norm                   norm
    """,
)

# Llama without a gate, and with another activation.
ARCEE = replace(
    LLAMA,
    heads={"tokens": Head("ArceeForCausalLM", "head lm_head")},
    shape={**LLAMA.shape, "mlp": "relu2"},
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5},
    required={"hidden_act": "relu2"},
)

# Llama with normalized queries and keys, and without biases in the MLP.
QWEN3 = replace(
    LLAMA,
    heads={"tokens": Head("Qwen3ForCausalLM", "head lm_head")},
    shape={**LLAMA.shape, "qk_norm": True},
    defaults={**LLAMA.defaults, "head_dim": 128, "num_key_value_heads": 32},
    required={"hidden_act": "silu", "use_sliding_window": False},
    biases=("attention_bias",),
    splits_evenly=False,
)

# Llama that looks both ways.
EUROBERT = replace(
    LLAMA,
    heads={
        "tokens": Head("EuroBertForMaskedLM", "head lm_head mlp_bias"),
        "text": Head(
            "EuroBertForSequenceClassification",
            """
            transform.0            dense                         bias
            head                   classifier                    bias
            """,
            {"classifier_pooling": "mean"},
        ),
        "words": Head("EuroBertForTokenClassification", "head classifier bias"),
    },
    shape={**LLAMA.shape, "causal": False},
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5, "classifier_pooling": "late"},
)

BERT = Family(
    heads={
        "tokens": Head(
            "BertForMaskedLM",
            """
            transform.0            cls.predictions.transform.dense      bias
            transform.2            cls.predictions.transform.LayerNorm  bias
            head                   cls.predictions                      bias
            """,
        ),
        "text": Head(
            "BertForSequenceClassification",
            """
            transform.0            bert.pooler.dense             bias
            head                   classifier                    bias
            """,
        ),
        "words": Head("BertForTokenClassification", "head classifier bias"),
    },
    shape={
        "causal": False,
        "norm_first": False,
        "n_types": 2,
        "norm": "layer",
        "position": "learned",
        "mlp": "gelu_erf",
        "qk_norm": False,
        "tie_embeddings": True,
        "n_encoder_layer": 0,
        "scale_embeddings": False,
    },
    keys={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
        "norm_eps": "layer_norm_eps",
    },
    defaults={"layer_norm_eps": 1e-12},
    required={
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
        "is_decoder": False,
    },
    biases=(),
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    prefix="bert.",
    weights="""
        tokens                 embeddings.word_embeddings
        positions              embeddings.position_embeddings
        types                  embeddings.token_type_embeddings
        embedding_norm         embeddings.LayerNorm                       bias
        blocks.N.attn.q        encoder.layer.N.attention.self.query       bias
        blocks.N.attn.k        encoder.layer.N.attention.self.key         bias
        blocks.N.attn.v        encoder.layer.N.attention.self.value       bias
        blocks.N.attn.out      encoder.layer.N.attention.output.dense     bias
        blocks.N.attn_norm     encoder.layer.N.attention.output.LayerNorm bias
        blocks.N.mlp.up        encoder.layer.N.intermediate.dense         bias
        blocks.N.mlp.down      encoder.layer.N.output.dense               bias
        blocks.N.mlp_norm      encoder.layer.N.output.LayerNorm           bias
    """,
)

# Post-norm, as the first Transformer.
MARIAN = Family(
    heads={"tokens": Head("MarianMTModel", "head final_logits bias row")},
    shape={
        "causal": True,
        "norm_first": False,
        "n_types": 0,
        "norm": "layer",
        "norm_eps": 1e-5,
        "position": "sinusoidal",
        "qk_norm": False,
        "tie_embeddings": True,
    },
    keys={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "decoder_layers",
        "n_encoder_layer": "encoder_layers",
        "n_head": "decoder_attention_heads",
        "n_embd": "d_model",
        "n_hidden": "decoder_ffn_dim",
        "mlp": "activation_function",
        "scale_embeddings": "scale_embedding",
        "start_id": "decoder_start_token_id",
    },
    defaults={"activation_function": "gelu", "scale_embedding": False},
    required={
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "share_encoder_decoder_embeddings": True,
        "normalize_embedding": False,
        "normalize_before": False,
        "add_final_layer_norm": False,
    },
    alike={
        "encoder_attention_heads": "decoder_attention_heads",
        "encoder_ffn_dim": "decoder_ffn_dim",
        "decoder_vocab_size": "vocab_size",
    },
    activations={"relu": "relu", "gelu": "gelu_erf", "gelu_new": "gelu", "swish": "silu"},
    biases=(),
    dropout=("dropout", "attention_dropout"),
    prefix="model.",
    weights="""
        tokens                         shared
        encoder.positions              encoder.embed_positions
        encoder.blocks.N.attn.q        encoder.layers.N.self_attn.q_proj          bias
        encoder.blocks.N.attn.k        encoder.layers.N.self_attn.k_proj          bias
        encoder.blocks.N.attn.v        encoder.layers.N.self_attn.v_proj          bias
        encoder.blocks.N.attn.out      encoder.layers.N.self_attn.out_proj        bias
        encoder.blocks.N.attn_norm     encoder.layers.N.self_attn_layer_norm      bias
        encoder.blocks.N.mlp.up        encoder.layers.N.fc1                       bias
        encoder.blocks.N.mlp.down      encoder.layers.N.fc2                       bias
        encoder.blocks.N.mlp_norm      encoder.layers.N.final_layer_norm          bias
        encoder.norm                   encoder.layer_norm                         bias
        positions                      decoder.embed_positions
        blocks.N.attn.q                decoder.layers.N.self_attn.q_proj          bias
        blocks.N.attn.k                decoder.layers.N.self_attn.k_proj          bias
        blocks.N.attn.v                decoder.layers.N.self_attn.v_proj          bias
        blocks.N.attn.out              decoder.layers.N.self_attn.out_proj        bias
        blocks.N.attn_norm             decoder.layers.N.self_attn_layer_norm      bias
        blocks.N.cross.q               decoder.layers.N.encoder_attn.q_proj       bias
        blocks.N.cross.k               decoder.layers.N.encoder_attn.k_proj       bias
        blocks.N.cross.v               decoder.layers.N.encoder_attn.v_proj       bias
        blocks.N.cross.out             decoder.layers.N.encoder_attn.out_proj     bias
        blocks.N.cross_norm            decoder.layers.N.encoder_attn_layer_norm   bias
        blocks.N.mlp.up                decoder.layers.N.fc1                       bias
        blocks.N.mlp.down              decoder.layers.N.fc2                       bias
        blocks.N.mlp_norm              decoder.layers.N.final_layer_norm          bias
        norm                           decoder.layer_norm                         bias
    """,
)

# Pre-norm, with learned positions.
BLENDERBOT = replace(
    MARIAN,
    heads={"tokens": Head("BlenderbotForConditionalGeneration", MARIAN.heads["tokens"].weights)},
    shape={**MARIAN.shape, "norm_first": True, "position": "learned"},
    required={**MARIAN.required, "normalize_before": True, "add_final_layer_norm": True},
    alike={key: MARIAN.alike[key] for key in ("encoder_attention_heads", "encoder_ffn_dim")},
)

# Pre-norm, with waves.
PEGASUS = replace(
    BLENDERBOT,
    heads={"tokens": Head("PegasusForConditionalGeneration", MARIAN.heads["tokens"].weights)},
    shape={**BLENDERBOT.shape, "position": "sinusoidal"},
)

FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "arcee": ARCEE,
    "qwen3": QWEN3,
    "eurobert": EUROBERT,
    "bert": BERT,
    "marian": MARIAN,
    "blenderbot": BLENDERBOT,
    "pegasus": PEGASUS,
}

# What the end of its name says of an architecture that does more than continue texts.
OTHERS = {
    "MaskedLM": "an encoder",
    "SequenceClassification": "a classifier",
    "TokenClassification": "a classifier",
}

# What config.json of any family may say, and not otherwise.
PLAIN = {
    "is_causal": (True,),
    "partial_rotary_factor": (1.0,),
    "layer_types": (["full_attention"],),
    "quantization_config": (None,),
    "problem_type": (None, "single_label_classification"),
}


# ------------------------------------------------------------------------------------------
# Names of weights


class Entry(NamedTuple):
    """A tensor of a family's file, and the tensors of ours that are stacked in it, by rows."""

    name: str  # in the file
    ours: dict[str, torch.Size]  # their names and shapes
    transposed: bool
    row: bool  # a bias that is a matrix of one row


def shapes_of(config: ModelConfig, *, bias: bool = True) -> dict[str, torch.Size]:
    """The shapes of the weights, and of all biases, of such a model."""
    with torch.device("meta"):  # without their memory
        model = build_model(replace(config, bias=bias))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def tied(config: ModelConfig) -> list[str]:
    """The names of further weights that are the embedding's."""
    head = config.tie_embeddings and config.head == "tokens"
    return ["head.weight"] * head + ["encoder.tokens.weight"] * (config.n_encoder_layer > 0)


def entries(family: Family, config: ModelConfig, hf_config: dict) -> Iterator[Entry]:
    """All tensors that a file of such a model holds. hf_config: its config.json."""
    shapes = shapes_of(config)
    having = {"bias", *(key for key in family.biases if hf_config.get(key))}
    tables = ((family.prefix, family.weights), ("", family.heads[config.head].weights))
    rows = [
        (prefix, row.split())
        for prefix, table in tables
        for row in table.splitlines()
        if row.strip()
    ]
    for prefix, (ours, own, *remarks) in rows:
        base, dot, last = ours.rpartition(".")
        modules = [base + dot + part for part in last.split("+")]
        kinds = ("weight", "bias") if having.intersection(remarks) else ("weight",)
        if f"{ours}.weight" in tied(config):
            kinds = kinds[1:]
        n, row = config.n_layer, "row" in remarks
        if ours.startswith("encoder."):
            n = config.n_encoder_layer
        for i in range(n if ".N." in ours else 1):
            for kind in kinds:
                names = [f"{module}.{kind}".replace(".N.", f".{i}.") for module in modules]
                if names[0] in shapes:
                    yield Entry(
                        f"{prefix}{own}{'_' if row else '.'}{kind}".replace(".N.", f".{i}."),
                        {name: shapes[name] for name in names},
                        kind == "weight" and "transposed" in remarks,
                        row,
                    )


# ------------------------------------------------------------------------------------------
# Keys of config.json


def read_config(hf_config: dict) -> tuple[Family, ModelConfig]:
    """The family and shape that a config.json tells of. Raises ValueError for what is foreign."""
    head = head_of(hf_config)
    require("model", hf_config, model_type=tuple(FAMILIES))
    hf_config, family = flatten(hf_config), FAMILIES[hf_config["model_type"]]
    required = {**family.required, **family.heads[head].required}
    allowed = {**PLAIN, **{key: (value,) for key, value in required.items()}}
    missing = {key: values[0] for key, values in allowed.items()} | family.defaults
    require("model", {**missing, **hf_config}, **allowed)
    for key, other in family.alike.items():
        if hf_config.get(key) is not None:
            require("model", hf_config, **{key: (hf_config.get(other),)})
    if family.activations:
        given = {**family.defaults, **hf_config}
        require("model", given, activation_function=tuple(family.activations))
        hf_config["activation_function"] = family.activations[given["activation_function"]]
    hints, values = get_type_hints(ModelConfig), {}
    for key, own in family.keys.items():
        value = hf_config.get(own, family.defaults.get(own))
        if value is None and own not in family.defaults:
            raise ValueError(f"it has no {own}")
        values[key] = value if value is None else coerce(own, value, hints[key])
        if isinstance(values[key], int) and values[key] > LARGEST:
            raise ValueError(f"{own}={value}: nanolm reads sizes up to {LARGEST}")
    kept = hf_config.get(OURS, {})
    kept = {key: coerce(key, kept[key], hints[key]) for key in hints if key in kept}
    kept |= {"n_kv_head": None, "head_size": None}  # GPT-2 has no such keys, and no choice
    values |= {"head": head, "labels": () if head == "tokens" else labels_of(hf_config)}
    return family, ModelConfig(**{"bias": True, **kept, **family.shape, **values})


def head_of(hf_config: dict) -> str:
    """What ModelConfig calls the head. Raises ValueError for another, saying what the model is."""
    architecture = str((hf_config.get("architectures") or ["it"])[0])
    heads = [pair for family in FAMILIES.values() for pair in family.heads.items()]
    known = {head.architecture: name for name, head in heads}
    if architecture in known:
        return known[architecture]
    ends = [end for end in OTHERS if architecture.endswith(end)]
    if ends or hf_config.get("is_encoder_decoder"):
        kind = OTHERS[ends[0]] if ends else "an encoder-decoder"
        like = [name for name in known if ends and name.endswith(ends[0])] or ["none"]
        raise ValueError(f"{architecture} is {kind}; of those, nanolm reads {', '.join(like)}")
    return "tokens"


def labels_of(hf_config: dict) -> tuple[str, ...]:
    """The names of the labels; where they are missing, there are two."""
    names = hf_config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[str(i)]) for i in range(len(names)))


def flatten(hf_config: dict) -> dict:
    """config.json, with what older and newer files say of positions and layers at its top."""
    found = dict(hf_config)
    for part in ("rope_parameters", "rope_scaling"):
        rope = hf_config.get(part) or {}
        require(part, {"rope_type": rope.get("type", "default"), **rope}, rope_type=("default",))
        found |= rope
    if found.get("layer_types"):
        found["layer_types"] = sorted(set(found["layer_types"]))
    return found


def family_of(config: ModelConfig) -> str:
    """The family that a model is of. Raises ValueError where there is none."""
    differing = {name: differences(config, family) for name, family in FAMILIES.items()}
    nearest = min(differing, key=lambda name: len(differing[name]))
    if not differing[nearest]:
        return nearest
    key, value = next(iter(differing[nearest].items()))
    raise ValueError(
        f"{key}={getattr(config, key)!r}: Hugging Face has no such model; {nearest}, which comes "
        f"nearest, has {value!r}"
    )


def differences(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys that a model would have to have otherwise to be of the family, and how."""
    needed, size = dict(family.shape), config.n_embd // config.n_head
    if config.head not in family.heads:
        needed["head"] = "tokens"
    if family.splits_evenly:
        needed["n_embd"] = size * config.n_head
    if "head_size" not in family.keys:
        needed |= {"head_size": size, "n_kv_head": config.n_head}
    found = {key: value for key, value in needed.items() if getattr(config, key) != value}
    reads = "n_encoder_layer" in family.keys
    if reads and not config.n_encoder_layer:
        found["n_encoder_layer"] = 1
    if family.activations and config.mlp not in family.activations.values():
        found["mlp"] = next(iter(family.activations.values()))
    return found


def config_json(family: Family, config: ModelConfig) -> dict:
    """The content of config.json, all but model_type and the ids of special tokens."""
    head, names = family.heads[config.head], config.labels
    hf_config = {own: getattr(config, key) for key, own in family.keys.items()}
    if "rope_theta" in hf_config:  # once for older versions, and once for newer ones
        hf_config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if "n_positions" in hf_config:
        hf_config["n_ctx"] = config.block_size  # its older name, which llama.cpp reads
    for own, mlp in family.activations.items():
        if mlp == config.mlp:
            hf_config["activation_function"] = own
    hf_config |= {key: hf_config[other] for key, other in family.alike.items()}
    if names:
        hf_config["id2label"] = {str(i): name for i, name in enumerate(names)}
        hf_config["label2id"] = {name: i for i, name in enumerate(names)}
    return {
        "architectures": [head.architecture],
        "dtype": "float32",
        **hf_config,
        **family.required,
        **head.required,
        **dict.fromkeys(family.dropout, config.dropout),
        **dict.fromkeys(family.biases, config.bias),
        OURS: asdict(config),
    }
