# Third stage: questions about idioms.
#   bash run.sh curriculum
out_dir = "out-small-3"
init_from = "out-small-2"
dataset = "idioms_sft"

batch_size = 16
max_iters = 200
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 20
eval_interval = 50
best_by = "last"
