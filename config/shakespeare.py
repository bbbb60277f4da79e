# Tiny Shakespeare on one GPU: nanoGPT's baby GPT. Without a GPU it takes days;
# config/shakespeare_cpu.py is for that.
#
# Time, loss and memory on a GPU: not measured. (nanoGPT's README reports a loss of 1.4697.)
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
warmup_iters = 100
learning_rate = 1e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # it overfits in the end; best.pt is what counts
