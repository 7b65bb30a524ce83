# Preferences in place of rewards: of two of its own translations the model learns to prefer the
# better. docs/translator.md has the command that samples and ranks them. Not measured at rank 32.
#   python train.py config/translate_small/dpo.py
out_dir = "out-translate-dpo"
init_from = "out-translate-lora"
dataset = "finance_dpo"
lora_rank = 32
lora_alpha = 64.0

batch_size = 16
max_iters = 150
learning_rate = 2e-4
beta = 0.1
dpo_sft_weight = 0.5  # without it answers grow unlikely, too, and no longer end
warmup_iters = 10
eval_interval = 25
