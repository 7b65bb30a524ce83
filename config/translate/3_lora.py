# Third phase: an adapter for finance; the model of the second phase stays as it is.
#   python train.py config/translate/3_lora.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.65.
out_dir = "out-minimind-lora"
init_from = "out-minimind-sft"
dataset = "finance_sft"
lora_rank = 16

batch_size = 64
max_iters = 1000
learning_rate = 2e-3
warmup_iters = 50
eval_interval = 100
