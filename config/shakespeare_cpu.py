# Tiny Shakespeare in minutes on a CPU: the size, batch and number of updates of nanoGPT's README
# example for CPUs, with a modern block.
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
