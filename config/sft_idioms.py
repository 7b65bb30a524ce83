# The novel's model learns idioms: their meanings, their origins, and which one has a meaning.
#   python data/fetch_data.py idioms
#   python data/idioms/prepare_sft.py
#   python train.py config/sft_idioms.py
# Two CPU cores, 67 s: ROUGE-L 0.982 on trained questions, 0.459 on those about other idioms, where
# the answer to the most similar trained question has 0.467.
out_dir = "out-idioms-sft"
dataset = "idioms_sft"
init_from = "out-sanguo"

batch_size = 16
max_iters = 400
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 30
eval_interval = 100
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
