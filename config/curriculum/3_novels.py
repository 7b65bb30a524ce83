# Third stage: all fifteen novels, and some Zhihu.
#   python data/jinyong/prepare.py --input=FILES --tokenizer=data/vocab
#   python train.py config/curriculum/3_novels.py
# For one GPU; not yet run on one.
out_dir = "out-curriculum-3"
init_from = "out-curriculum-2"
dataset = "jinyong:9,zhihu:1"
dropout = 0.1

batch_size = 32
max_iters = 4000
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 100
eval_interval = 200
patience = 5
