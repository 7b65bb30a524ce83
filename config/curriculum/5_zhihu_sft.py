# Fifth stage, the first that answers: the domain's questions of Zhihu.
#   python data/zhihu/prepare_sft.py --input=FILES --tokenizer=data/vocab --keywords=WORDS
#   python train.py config/curriculum/5_zhihu_sft.py
# For one GPU; not yet run on one. Rates as measured with as many rows on the questions of the novel
# 三国演义; not measured here.
out_dir = "out-curriculum-5"
init_from = "out-curriculum-4"
dataset = "zhihu_sft"

batch_size = 64
max_iters = 1000
learning_rate = 2e-3
embedding_lr = 1e-2
warmup_iters = 100
eval_interval = 250
