# Second phase: English is asked, its Chinese is the answer; general sentences only.
#   python train.py config/translate/2_sft.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.60. The rates of
# config/translate_small/2_sft.py, its decays for 8 times the rows; not measured here.
out_dir = "out-minimind-sft"
init_from = "out-minimind-pretrain"
dataset = "translation_sft"

batch_size = 256
max_iters = 800
learning_rate = 4e-3
weight_decay = 4.0
embedding_lr = 2e-2
embedding_decay = 0.8
warmup_iters = 50
eval_interval = 200
