# Finetune GPT-2 on tiny Shakespeare, as nanoGPT's config of this name does (there gpt2-xl, for a
# large GPU: --init_from=gpt2-xl). For a text of your own, prepare it with GPT-2's tokens and give
# its name: python prepare.py mytext --input PATH --tokenizer=gpt2
#
# Weights and text are downloaded. Time, loss and memory: not measured.
init_from = "gpt2"
dataset = "shakespeare"

batch_size = 1
gradient_accumulation_steps = 32  # with 1,024 tokens each, an epoch is about nine updates
max_iters = 20

learning_rate = 3e-5
decay_lr = False
warmup_iters = 0

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits soon; best.pt is what counts
