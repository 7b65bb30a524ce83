# Third phase: an adapter for finance; the model of the second phase stays as it is.
#   bash run.sh translate
# Two CPU cores, 7 minutes: finance test BLEU 13.0, chrF++ 13.1.
out_dir = "out-translate-lora"
init_from = "out-translate-sft"
dataset = "finance_sft"
lora_rank = 8

batch_size = 32
max_iters = 900
learning_rate = 5e-3
warmup_iters = 50
eval_interval = 150
