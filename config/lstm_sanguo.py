# The LSTM on 三国演义, to compare with config/pretrain_sanguo.py: 4.27M parameters beside its
# 4.26M, the same rows of text in the same order, as many steps.
#   python train.py config/lstm_sanguo.py
out_dir = "out-sanguo-lstm"
dataset = "sanguo"

model = "lstm"
n_layer = 2
n_embd = 404
block_size = 256

optimizer = "adamw"
batch_size = 4
max_iters = 850
learning_rate = 3e-3
warmup_iters = 30
eval_interval = 170
