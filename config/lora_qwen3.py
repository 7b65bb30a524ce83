# An adapter on Qwen3-0.6B, for a laptop without a GPU: 3.9 GB of memory.
#   python data/fetch_data.py --hub=Qwen/Qwen3-0.6B
#   python data/custom/prepare.py --input=data/sanguo/qa.jsonl --name=sanguo_qwen3 \
#     --tokenizer=models/Qwen3-0.6B
#   python train.py config/lora_qwen3.py
# Two cores of an Intel Xeon at 2.8 GHz: 18 to 24 s a step, 60 to 80 minutes (two dry runs, random
# weights of that shape). With the published weights it has not been run, and its rate not been
# tuned: docs/base.md.
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
checkpoint_activations = True
