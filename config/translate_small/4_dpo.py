# Fourth phase: of two of its own translations of finance the model learns to prefer the better.
#   bash run.sh translate
out_dir = "out-translate-dpo"
init_from = "out-translate-lora"
dataset = "finance_dpo"
lora_rank = 8

batch_size = 16
max_iters = 75
learning_rate = 2e-4
dpo_beta = 0.1
warmup_iters = 10
eval_interval = 15
