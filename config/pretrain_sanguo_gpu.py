# 三国演义 at the reference size (6 layers, 8 heads, 512 wide) in the modern architecture, one GPU.
#   python train.py config/pretrain_sanguo_gpu.py
# Not yet run on a GPU. The recipe is that of config/pretrain_sanguo.py, which at this size and in
# 420 steps on one CPU core had 1.943 bits per byte (docs/recipe.md).
out_dir = "out-sanguo-gpu"
dataset = "sanguo"

n_layer = 6
n_head = 8
n_kv_head = 1
n_embd = 512
block_size = 256

batch_size = 16
max_iters = 680
short_block = 64
learning_rate = 6e-3
weight_decay = 4.0
embedding_lr = 4e-2
embedding_decay = 0.7
warmup_iters = 30
eval_interval = 170
