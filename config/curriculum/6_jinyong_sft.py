# Sixth and last stage: curated questions and answers.
#   python data/jinyong/prepare_sft.py --input=sft_data.jsonl --tokenizer=data/vocab
#   python train.py config/curriculum/6_jinyong_sft.py
# For one GPU; not yet run on one. Rates as measured with as many rows on the questions of the novel
# 三国演义; not measured here.
out_dir = "out-curriculum-6"
init_from = "out-curriculum-5"
dataset = "jinyong_sft"

batch_size = 64
max_iters = 500
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 50
eval_interval = 250
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
