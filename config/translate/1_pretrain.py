# The translator at MiniMind's size, first phase: English and its Chinese, as texts.
#   python train.py config/translate/1_pretrain.py
# For one GPU; not yet run on one. What the course asks of it: perplexity below 15. Eight readings
# of the general texts, with decays for so many (docs/recipe.md); not measured here.
# MiniMind's architecture: 8 layers of 512, 8 query heads on 2 of keys and values, 6,400 entries.
out_dir = "out-minimind-pretrain"
dataset = "translation:7,finance:3"

n_layer = 8
n_head = 8
n_kv_head = 2
n_embd = 512
block_size = 256
rope_theta = 1e6
norm_eps = 1e-5
qk_norm = False

batch_size = 64
max_iters = 2000
learning_rate = 4e-3
weight_decay = 2.0
embedding_lr = 2e-2
embedding_decay = 0.5
warmup_iters = 100
eval_interval = 500
