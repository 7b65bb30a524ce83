# Second phase: English is asked, its Chinese is the answer; general sentences only.
#   bash run.sh translate
# Two CPU cores, 25 minutes: general test BLEU 21.6, chrF++ 26.8; finance 6.8 and 8.5.
out_dir = "out-translate-sft"
init_from = "out-translate-pretrain"
dataset = "translation_sft"

batch_size = 32
max_iters = 2500
learning_rate = 4e-3
weight_decay = 0.5
embedding_lr = 2e-2
embedding_decay = 0.1
warmup_iters = 50
eval_interval = 250
