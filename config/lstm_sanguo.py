# The LSTM on 三国演义, to compare with the GPT of config/pretrain_sanguo.py: as many parameters,
# 3.87M, the same rows of text in the same order.
#   python train.py config/lstm_sanguo.py
# One CPU core, 8 minutes: 2.010 bits per byte on the validation chapters, where the GPT had 1.932
# (both trained on 108 chapters, before some became the test split)
out_dir = "out-sanguo-lstm"
dataset = "sanguo"

model = "lstm"
n_layer = 2
n_embd = 380
block_size = 256

optimizer = "adamw"
batch_size = 16
max_iters = 680
short_block = 64
learning_rate = 3e-3
weight_decay = 0.5
embedding_lr = 2e-2
embedding_decay = 0.7
warmup_iters = 30
eval_interval = 170
