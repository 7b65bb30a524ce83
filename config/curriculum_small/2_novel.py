# Second stage: the novel, and some idioms.
#   bash run.sh curriculum
out_dir = "out-small-2"
init_from = "out-small-1"
dataset = "sanguo:4,idioms:1"

batch_size = 16
max_iters = 250
learning_rate = 4e-3
weight_decay = 4.0
embedding_lr = 2e-2
embedding_decay = 0.5
warmup_iters = 20
eval_interval = 50
