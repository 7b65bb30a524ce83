# The demonstration: a small model of 三国演义.
#   python train.py config/pretrain_sanguo.py
# Two CPU cores, 4 minutes: 2.314 bits per byte on the validation chapters, 4.26M parameters.
out_dir = "out-sanguo"
dataset = "sanguo"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256

batch_size = 4
max_iters = 850
learning_rate = 3e-3
warmup_iters = 30
eval_interval = 170
