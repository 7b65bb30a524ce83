# The demonstration: a small model of 三国演义.
#   python train.py config/pretrain_sanguo.py
# 18 minutes on two cores of the slowest processor tried: 1.947 bits per byte on the validation
# chapters, 3.87M parameters.
# docs/recipe.md says what was tried, and what each choice gave.
out_dir = "out-sanguo"
dataset = "sanguo"

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
block_size = 256

batch_size = 16
max_iters = 680  # seven readings of the novel: it is the decay that lets them all help
short_block = 64
learning_rate = 6e-3
weight_decay = 4.0
embedding_lr = 4e-2
embedding_decay = 0.7
warmup_iters = 30
eval_interval = 170
