# Fifth stage, the first that answers: the domain's questions of Zhihu.
#   python data/zhihu/prepare_sft.py --input=FILES --tokenizer=data/vocab --keywords=WORDS
#   python train.py config/curriculum/5_zhihu_sft.py
# For one GPU; not yet run on one.
out_dir = "out-curriculum-5"
init_from = "out-curriculum-4"
dataset = "zhihu_sft"
dropout = 0.1

batch_size = 32
max_iters = 2000
learning_rate = 5e-4
warmup_iters = 50
eval_interval = 100
