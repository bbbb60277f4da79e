# What does a function do? A decoder reads its source and writes the first paragraph of its
# docstring. To begin with one that has read English, --init_from=out/pydocs_long.
#
# Measured on one busy core, float32, 7m: ROUGE-L 0.152 from scratch, 0.188 from that pretraining;
# the function's name has 0.146.
task = "completion"
dataset = "pysummaries"
best_by = "rouge_l"
eval_answers = 100

n_layer = 4
n_head = 4
n_embd = 128
block_size = 384
norm = "rms"
position = "rotary"
mlp = "swiglu"
qk_norm = True
dropout = 0.3
label_smoothing = 0.1

batch_size = 4  # rows of several examples
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 1000
warmup_iters = 40
learning_rate = 1e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 250
eval_iters = 0
log_interval = 50
