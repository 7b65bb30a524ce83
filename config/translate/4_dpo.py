# Fourth phase: of two of its own translations of finance the model learns to prefer the better.
#   python data/finance/prepare_dpo.py --out_dir=out-minimind-lora --out=data/finance_dpo_minimind
#   python train.py config/translate/4_dpo.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.70. Its pairs can
# be ranked by COMET (--rank=comet). The rate of config/translate_small/dpo.py; not measured.
out_dir = "out-minimind-dpo"
init_from = "out-minimind-lora"
dataset = "finance_dpo_minimind"
lora_rank = 32
lora_alpha = 64.0

batch_size = 64  # pairs
max_iters = 80
learning_rate = 2e-4
beta = 0.1
dpo_sft_weight = 0.5
warmup_iters = 8
eval_interval = 40
