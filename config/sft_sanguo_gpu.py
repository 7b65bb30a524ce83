# Answering at the reference size, one GPU; after config/pretrain_sanguo_gpu.py.
#   python train.py config/sft_sanguo_gpu.py
# Not yet run on a GPU.
out_dir = "out-sanguo-sft-gpu"
dataset = "sanguo_sft"
init_from = "out-sanguo-gpu"
dropout = 0.1

batch_size = 32
max_iters = 1000
learning_rate = 5e-4
warmup_iters = 50
eval_interval = 50
best_by = "last"
