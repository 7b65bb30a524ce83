# Fourth phase: of eight of its own translations of a sentence of finance the model learns to prefer
# the better, by their chrF++, form and length.
#   bash run.sh translate
# Two cores of an Intel Xeon with AMX, 5 minutes: finance test BLEU 21.1, chrF++ 18.0, as before it,
# but half of the repetition.
out_dir = "out-translate-grpo"
init_from = "out-translate-lora"
dataset = "finance_sft"
reward = ["chrf", "form", "length"]  # chrf alone is got by writing again, form by writing less
lora_rank = 32
lora_alpha = 64.0

batch_size = 16
max_iters = 100
learning_rate = 6e-4
beta = 0.02
warmup_iters = 5
eval_interval = 50
best_by = "last"
