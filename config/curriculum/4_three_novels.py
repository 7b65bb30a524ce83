# Fourth stage: the three novels that the questions are about.
#   python data/jinyong/prepare.py --input=FILES --tokenizer=data/vocab --out=data/jinyong_three
#   python train.py config/curriculum/4_three_novels.py
# For one GPU; not yet run on one. The third stage's decays, half of its rates; not measured.
out_dir = "out-curriculum-4"
init_from = "out-curriculum-3"
dataset = "jinyong_three:8,jinyong:2"

batch_size = 32
max_iters = 1000  # some eight readings
learning_rate = 1e-3
weight_decay = 3.0
embedding_lr = 5e-3
embedding_decay = 0.7
warmup_iters = 50
eval_interval = 200
patience = 3
