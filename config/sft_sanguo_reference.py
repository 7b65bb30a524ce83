# The reference MiniGLM learns to answer; after config/pretrain_sanguo_reference.py.
#   python data/sanguo/prepare_sft.py --tokenizer=data/sanguo_gpt2 --out=data/sanguo_sft_gpt2
#   python train.py config/sft_sanguo_reference.py
# For one GPU; not yet run on one, nor is its rate measured: half of pretraining's. A row takes 117
# tokens of GPT-2's vocabulary.
out_dir = "out-sanguo-reference-sft"
dataset = "sanguo_sft_gpt2"
init_from = "out-sanguo-reference"
dropout = 0.2

batch_size = 64
max_iters = 350  # 17 readings, as dropout slows learning by heart
optimizer = "adamw"
learning_rate = 5e-4
embedding_lr = 5e-4
warmup_iters = 35
beta2 = 0.99
eval_interval = 175
best_by = "last"
