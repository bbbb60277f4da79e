# English -> German: an encoder and a decoder of three layers each, on what programs tell people
# (messages_de, 11,500 pairs; docs/answers.md says where they come from).
#
# Measured on one core of an AMD EPYC of 2021, float32: BLEU 26.3 on 1,000 texts after 41m49s.
out_dir = "out/translate_messages"
dataset = "messages_de"
task = "seq2seq"

# model
n_encoder_layer = 3
n_layer = 3
n_head = 4
n_embd = 192
block_size = 128
position = "sinusoidal"
mlp = "relu"
bias = True
scale_embeddings = True
dropout = 0.2
label_smoothing = 0.1

# training
optimizer = "muon"
learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 200
max_iters = 2000
batch_tokens = 4096  # sources and answers together
gradient_accumulation_steps = 1
eval_interval = 500
eval_iters = 0
log_interval = 20
