# Second phase: English is asked, its Chinese is the answer; general sentences only.
#   bash run.sh translate
# Two cores of an Intel Xeon with AMX, 9 to 11 minutes: general test BLEU 26.8, chrF++ 30.8; finance
# 11.3 and 11.4.
out_dir = "out-translate-sft"
init_from = "out-translate-pretrain"
dataset = "translation_sft"

batch_size = 64
max_iters = 1400
learning_rate = 1e-3  # at 4e-3 it first forgets what the first phase has learnt
weight_decay = 1.0
embedding_lr = 5e-3
embedding_decay = 0.2
warmup_iters = 50
eval_interval = 350
