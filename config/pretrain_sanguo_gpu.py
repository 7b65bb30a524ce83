# 三国演义 at the reference size (6 layers, 8 heads, 512 wide) in the modern architecture, one GPU.
#   python train.py config/pretrain_sanguo_gpu.py
# Not yet run on a GPU. Twice the rows of config/pretrain_sanguo.py, half of its steps, its rates x
# 1.2, decays that forget within as many readings. Measured at its size on a CPU, not at this one:
# 0.010 bits per byte behind it (docs/recipe.md, "On a GPU").
out_dir = "out-sanguo-gpu"
dataset = "sanguo"

n_layer = 6
n_head = 8
n_kv_head = 1
n_embd = 512
block_size = 256

batch_size = 32
max_iters = 340
short_block = 64
learning_rate = 7.2e-3
weight_decay = 6.7
embedding_lr = 4.8e-2
embedding_decay = 1.17
warmup_iters = 24
eval_interval = 170
