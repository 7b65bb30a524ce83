# The translator for two CPU cores, first phase: English and its Chinese, as texts.
#   bash run.sh translate
# Two CPU cores, 15 minutes: 4.46M parameters, validation loss 3.081.
out_dir = "out-translate-pretrain"
dataset = "translation:3,finance:2"

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
block_size = 256

batch_size = 16
max_iters = 1000
learning_rate = 6e-3
weight_decay = 0.5
embedding_lr = 4e-2
embedding_decay = 0.1
warmup_iters = 50
eval_interval = 200
