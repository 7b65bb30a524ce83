# Second phase: English is asked, its Chinese is the answer; general sentences only.
#   python train.py config/translate/2_sft.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.60.
out_dir = "out-minimind-sft"
init_from = "out-minimind-pretrain"
dataset = "translation_sft"
dropout = 0.1

batch_size = 64
max_iters = 2500
learning_rate = 2e-3
weight_decay = 1.0
embedding_lr = 1e-2
embedding_decay = 0.2
warmup_iters = 100
eval_interval = 250
