# Python's own documentation, on any machine: what `make train` runs.
#
# Measured on two cores of an AMD EPYC of 2021, float32, not compiled: 2m03s with its evaluations,
# loss 3.9188 (1.8203 bits per byte) on a part of the validation text.
# On a GPU: not measured.
#
# The dataset brings a tokenizer of 2,048 tokens, chosen by bits per byte after the same training
# time with AdamW: 512 tokens give 1.992, 1,024 1.995, 2,048 1.978, 4,096 1.977 and 8,192 1.983 (in
# 1,500, 1,500, 1,200, 930 and 630 updates); and characters, about 2.24.
dataset = "pydocs"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
norm = "rms"
position = "rotary"
mlp = "swiglu"
qk_norm = True

batch_size = 24
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 650
warmup_iters = 40
learning_rate = 5e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 130
eval_iters = 20
log_interval = 26
sample_tokens = 80
