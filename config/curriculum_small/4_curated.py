# Fourth stage: questions about the novel.
#   bash run.sh curriculum
out_dir = "out-small-4"
init_from = "out-small-3"
dataset = "sanguo_sft"

batch_size = 16
max_iters = 300
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 20
eval_interval = 50
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
