# Second phase: English is asked, its Chinese is the answer; general sentences only.
#   python train.py config/translate/2_sft.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.60. As many readings
# as config/translate_small/2_sft.py has, 1.5 times its rates for 4 times the rows, and decays that
# forget within as many readings (docs/recipe.md); not measured.
out_dir = "out-minimind-sft"
init_from = "out-minimind-pretrain"
dataset = "translation_sft"

batch_size = 256
max_iters = 350
learning_rate = 1.5e-3
weight_decay = 2.7
embedding_lr = 7.5e-3
embedding_decay = 0.53
warmup_iters = 25
eval_interval = 70
