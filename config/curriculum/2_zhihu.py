# Second stage: questions and answers of Zhihu as texts, and some news so that they stay known.
#   python data/zhihu/prepare.py --input=FILES --tokenizer=data/vocab --val=0.002
#   python train.py config/curriculum/2_zhihu.py
# For one GPU; not yet run on one. Half of the first stage's rates; not measured.
out_dir = "out-curriculum-2"
init_from = "out-curriculum-1"
dataset = "zhihu:9,sohu_news:1"

batch_size = 32
max_iters = 20000
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 200
eval_interval = 1000
