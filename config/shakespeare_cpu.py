# Tiny Shakespeare in minutes on a CPU: the size, batch and number of updates of nanoGPT's README
# example for CPUs, with a modern block.
#
# Measured on two cores of an AMD EPYC of 2021, float32, not compiled: 2m56s with its evaluations,
# 0.43 GB of memory, loss 1.6561 on the whole validation text. (nanoGPT's example, on the
# same machine: 1.90.)
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

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
warmup_iters = 100
learning_rate = 4e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 500
eval_iters = 0  # the whole validation text
log_interval = 50
