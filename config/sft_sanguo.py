# The demonstration, second step: the novel's model learns to answer, on two CPU cores.
#   python train.py config/sft_sanguo.py
out_dir = "out-sanguo-sft"
dataset = "sanguo_sft"
init_from = "out-sanguo"

batch_size = 32
max_iters = 500
learning_rate = 2e-3
warmup_iters = 20
eval_interval = 125
