# 三国演义 on one GPU, a T4 (Colab, Kaggle): float16 with a gradient scaler, some 2 of its 15 GB.
#   python train.py config/pretrain_sanguo_t4.py
# Not yet run on one. Else as config/pretrain_sanguo_gpu.py.
out_dir = "out-sanguo-t4"
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
dtype = "float16"
