# The loss of OpenAI's gpt2-large, as it is, on tiny Shakespeare; or, with --dataset=NAME, on any
# text that is prepared with GPT-2's tokens. Weights and text are downloaded. Loss: not measured.
init_from = "gpt2-large"
dataset = "shakespeare"
eval_only = True
batch_size = 8
eval_iters = 0  # the whole validation text
