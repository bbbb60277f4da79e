# What does shutil.copyfile do? A decoder answers questions about names of Python; talk with it by
# python sample.py --chat. To begin with one that has read English, --init_from=out/pydocs_long.
#
# Measured on one busy core, float32, 4m16s: validation loss 4.2104; 3.2421 from that pretraining.
task = "completion"
dataset = "pyhelp"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 384
norm = "rms"
position = "rotary"
mlp = "swiglu"
qk_norm = True
dropout = 0.1

batch_size = 4  # rows of several examples
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 600
warmup_iters = 40
learning_rate = 2e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 200
eval_iters = 0
log_interval = 50
