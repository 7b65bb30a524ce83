# Third phase: an adapter for finance; the model of the second phase stays as it is.
#   python train.py config/translate/3_lora.py
# For one GPU; not yet run on one. What the course asks of it: COMET 0.65. 1.8 times the readings
# of config/translate_small/3_lora.py, 1.5 times its rate for 8 times the rows; not measured.
out_dir = "out-minimind-lora"
init_from = "out-minimind-sft"
dataset = "finance_sft"
lora_rank = 32
lora_alpha = 64.0

batch_size = 256
max_iters = 200
learning_rate = 3e-3
warmup_iters = 20
eval_interval = 100
