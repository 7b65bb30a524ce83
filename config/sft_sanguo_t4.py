# Answering on one GPU, a T4; after config/pretrain_sanguo_t4.py.
#   python train.py config/sft_sanguo_t4.py
# Not yet run on one. Else as config/sft_sanguo_gpu.py.
out_dir = "out-sanguo-sft-t4"
dataset = "sanguo_sft"
init_from = "out-sanguo-t4"

batch_size = 64
max_iters = 175
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 17
eval_interval = 175
dtype = "float16"
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
