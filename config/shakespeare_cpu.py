# Tiny Shakespeare in minutes on a CPU: the size of nanoGPT's README example for CPUs, with a
# modern block (Qwen3's) and Muon; config/README.md says what else was tried.
#
# Measured on two cores of an AMD EPYC of 2021, float32, not compiled: 3m00s with its evaluations,
# loss 1.5764 on the whole validation text. (nanoGPT's example, beside it: 1.8983 after 3m32s.)
# On a GPU: not measured.
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
norm = "rms"
position = "rotary"
mlp = "swiglu"
qk_norm = True
n_hidden = 344  # so that there are as many parameters as in a GPT-2 block

batch_size = 32
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 600
warmup_iters = 30
learning_rate = 6e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 300
eval_iters = 0  # the whole validation text
log_interval = 25
