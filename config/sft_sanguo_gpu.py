# Answering at the reference size, one GPU; after config/pretrain_sanguo_gpu.py.
#   python train.py config/sft_sanguo_gpu.py
# Not yet run on a GPU. Rows, steps and rates are measured at the size of config/sft_sanguo.py, on
# answers alone (docs/recipe.md, "Fine-tuning").
out_dir = "out-sanguo-sft-gpu"
dataset = "sanguo_sft:8,sanguo:1"
init_from = "out-sanguo-gpu"

batch_size = 72
max_iters = 175
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 17
eval_interval = 175
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
