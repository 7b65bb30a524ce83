# The demonstration, second step: the novel's model learns to answer.
#   python train.py config/sft_sanguo.py
# 7 minutes on two cores of the slowest processor tried: ROUGE-L 0.988 on trained questions,
# 0.272 on unseen ones.
out_dir = "out-sanguo-sft"
dataset = "sanguo_sft:8,sanguo:1"  # so that it still can continue the novel
init_from = "out-sanguo"

batch_size = 36  # on average 32 questions, 4 rows of the novel
max_iters = 350
learning_rate = 1e-3
embedding_lr = 5e-3
warmup_iters = 25
eval_interval = 175
best_by = "last"  # the loss on unseen answers rises while the trained ones are learnt by heart
