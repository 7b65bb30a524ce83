# Third phase: an adapter for finance; the model of the second phase stays as it is.
#   python train.py config/translate/3_lora.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.65. The rate
# of config/translate_small/3_lora.py; not measured with as many rows.
out_dir = "out-minimind-lora"
init_from = "out-minimind-sft"
dataset = "finance_sft"
lora_rank = 16

batch_size = 256
max_iters = 400
learning_rate = 5e-3
warmup_iters = 40
eval_interval = 200
