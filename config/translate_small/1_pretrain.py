# The translator for two CPU cores, first phase: English and its Chinese, as texts.
#   bash run.sh translate
# Two cores of an Intel Xeon with AMX, 19 to 22 minutes: 4.46M parameters, perplexity 14.84 on the
# general validation texts.
out_dir = "out-translate-pretrain"
dataset = "translation:7,finance:3"

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
block_size = 256

batch_size = 16
max_iters = 4350
learning_rate = 6e-3
weight_decay = 1.0
embedding_lr = 4e-2
embedding_decay = 0.2
warmup_iters = 50
eval_interval = 870
