# MiniMind's recipe at the demonstration's size, to compare with: its 6,400 entries, its
# architecture (no norm of queries and keys), torch's AdamW as it comes, no warm-up.
#   python data/sanguo/prepare.py --vocab_size=6400 --out=data/sanguo_6400
#   python train.py config/minimind.py
# `python -m bench quality` trains it for a given time. As everywhere in this repository the decay
# is linear (MiniMind's is a cosine) and norms are not decayed.
out_dir = "out-minimind"
dataset = "sanguo_6400"

n_layer = 4
n_head = 4
n_kv_head = 1
n_embd = 256
block_size = 256
rope_theta = 1e6
norm_eps = 1e-5
qk_norm = False
init = "gpt2"

batch_size = 16
max_iters = 1000
optimizer = "adamw"
learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 0
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
eval_interval = 100
