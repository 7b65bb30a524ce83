# Sixth and last stage: curated questions and answers.
#   python data/jinyong/prepare_sft.py --input=sft_data.jsonl --tokenizer=data/vocab
#   python train.py config/curriculum/6_jinyong_sft.py
# For one GPU; not yet run on one.
out_dir = "out-curriculum-6"
init_from = "out-curriculum-5"
dataset = "jinyong_sft"
dropout = 0.1

batch_size = 32
max_iters = 1000
learning_rate = 3e-4
warmup_iters = 50
eval_interval = 50
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
