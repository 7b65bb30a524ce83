# 三国演义 at the reference size (6 layers, 8 heads, 512 wide) in the modern architecture, one GPU.
#   python train.py config/pretrain_sanguo_gpu.py
# Not yet run on a GPU; the rates are guesses from those of config/pretrain_sanguo.py, lower since
# the model is wider. A small novel overfits: dropout, and patience stops in time.
out_dir = "out-sanguo-gpu"
dataset = "sanguo"

n_layer = 6
n_head = 8
n_embd = 512
block_size = 256
dropout = 0.2

batch_size = 32
max_iters = 2000
learning_rate = 4e-3
embedding_lr = 2e-2
warmup_iters = 100
eval_interval = 100
patience = 5
