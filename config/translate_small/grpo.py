# Rewards instead of preferences: eight translations of each sentence, weighed by chrF++ and form.
#   python train.py config/translate_small/grpo.py
# Two CPU cores, 200 s: finance test BLEU 13.5, chrF++ 13.1, where DPO has 13.6 and 13.1.
out_dir = "out-translate-grpo"
init_from = "out-translate-lora"
dataset = "finance_sft"
reward = ["chrf", "form"]  # chrf alone is got by writing more, and again
lora_rank = 8

batch_size = 16
max_iters = 75
learning_rate = 2e-3
beta = 0.02
warmup_iters = 5
eval_interval = 25
best_by = "last"
