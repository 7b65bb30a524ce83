# An adapter on Qwen3-0.6B, for a laptop without a GPU.
out_dir = "out-lora-qwen3"
init_from = "models/Qwen3-0.6B"
dataset = "sanguo_qwen3"
lora_rank = 16

block_size = 512
batch_size = 8
gradient_accumulation_steps = 2
max_iters = 200
optimizer = "adamw"
learning_rate = 2e-4
warmup_iters = 10
eval_interval = 100
dtype = "float32"
checkpoint_activations = True
