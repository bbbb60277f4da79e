# GPT-2's shape, 124M parameters, on a text of your own. First prepare it with GPT-2's vocabulary:
# python prepare.py mytext --input PATH --tokenizer=gpt2
#
# Meant for GPUs, and for a large text. Time, loss and memory: not measured.
dataset = "mytext"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = True

batch_size = 12
gradient_accumulation_steps = 5 * 8  # 491,520 tokens per update
max_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = learning_rate / 10
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
