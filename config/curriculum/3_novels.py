# Third stage: all fifteen novels, and some Zhihu.
#   python data/jinyong/prepare.py --input=FILES --tokenizer=data/vocab
#   python train.py config/curriculum/3_novels.py
# For one GPU; not yet run on one. Ten readings or so of the novels, so decay is strong in place of
# dropout: rate x decay forgets within as many readings as measured on one novel (docs/recipe.md).
out_dir = "out-curriculum-3"
init_from = "out-curriculum-2"
dataset = "jinyong:9,zhihu:1"

batch_size = 32
max_iters = 4000
learning_rate = 2e-3
weight_decay = 3.0
embedding_lr = 1e-2
embedding_decay = 0.7
warmup_iters = 100
eval_interval = 400
patience = 5
