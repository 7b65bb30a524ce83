# Eight GPUs: 88M parameters on MiniMind's pretraining texts.
#   python data/minimind/prepare.py --input=my/pretrain.jsonl --vocab_size=16384 --val=0.002
#   torchrun --standalone --nproc_per_node=8 train.py config/pretrain_minimind_8gpu.py
# Not yet run on GPUs, its rates not measured. A step has 131,072 tokens, 16,384 a GPU, whatever the
# number of GPUs: fewer take several micro-batches each. 15,000 steps are 2.0e9 tokens, some 22 a
# parameter: five readings of 1.6 GB of text.
out_dir = "out-minimind-8gpu"
dataset = "minimind"

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
block_size = 512

batch_size = 32
gradient_accumulation_steps = 8
max_iters = 15000
learning_rate = 4e-3
embedding_lr = 2e-2
warmup_iters = 300
eval_interval = 1500
