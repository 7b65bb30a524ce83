# The curriculum of the reference report, first of six stages: news.
#   python data/sohu_news/prepare.py --input=FILES --tokenizer=data/vocab --val=0.002
#   python train.py config/curriculum/1_news.py
# For one GPU; not yet run on one, its rates not measured. An evaluation reads the whole validation
# split, so it is kept small. All stages have one vocabulary, trained on their texts together:
#   python data/train_tokenizer.py train --vocab_size=16384 --out=data/vocab/tokenizer.json FILES
out_dir = "out-curriculum-1"
dataset = "sohu_news"

n_layer = 6
n_head = 8
n_embd = 512
block_size = 512

batch_size = 32
max_iters = 20000
learning_rate = 4e-3
embedding_lr = 2e-2
warmup_iters = 200
eval_interval = 1000
