# A curriculum of four stages at a small size, first: what 30,000 idioms mean.
#   bash run.sh curriculum
# Two CPU cores, a minute or two a stage.
out_dir = "out-small-1"
dataset = "idioms"

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
block_size = 256

batch_size = 16
max_iters = 200
short_block = 64
learning_rate = 6e-3
weight_decay = 4.0
embedding_lr = 4e-2
embedding_decay = 0.1
warmup_iters = 30
eval_interval = 50
