# Masked pretraining of an encoder on Python's own documentation, to finetune it afterwards:
# config/classify_pymodules.py can begin with what comes out of this.
#
# Measured on one busy core, float32: 7m42s, a validation loss of 3.2553 per hidden token, of
# which it guesses 40%. How much is hidden was chosen by what comes after: docs/labels.md.
task = "masked"
dataset = "pydocs"
mask_fraction = 0.3

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
norm = "rms"
position = "rotary"
mlp = "swiglu"

batch_size = 16
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 2000
warmup_iters = 60
learning_rate = 5e-3
min_lr = learning_rate / 10
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
