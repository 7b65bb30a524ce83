# The reference MiniGLM: GPT-2's vocabulary (padded to 50,304) and architecture, 45M parameters.
#   python data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2
#   python train.py config/pretrain_sanguo_reference.py
# For one GPU; not yet run on one. It is here to compare with: config/pretrain_sanguo_gpu.py learns
# more from the same text. Its head of 50,304 keeps a GPU busy with 8,192 tokens a step, so its
# recipe stays as it was, one rate for all; patience ends it long before 20,000 steps.
out_dir = "out-sanguo-reference"
dataset = "sanguo_gpt2"

n_layer = 6
n_head = 8
n_embd = 512
block_size = 256
position = "learned"
norm = "layernorm"
norm_eps = 1e-5
mlp = "gelu"
qk_norm = False
init = "gpt2"
dropout = 0.2

batch_size = 32
max_iters = 20000
optimizer = "adamw"
learning_rate = 1e-3
embedding_lr = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
eval_interval = 1000
patience = 3
