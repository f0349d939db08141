"""Training of the project's own small DSA model, in plain PyTorch on one GPU.

    python -m misa_vllm.train.corpus .cache/corpus                                    text and tokenizer, no GPU
    python -m misa_vllm.train --data .cache/corpus --out .cache/first --minutes 9 --until 0.5 --workers 12
    python -m misa_vllm.train --data .cache/corpus --out .cache/second --minutes 9 --resume .cache/first --workers 12
    python -m misa_vllm.train.plot .cache/second/curves.jsonl curves.png
    python -m misa_vllm.train.ngram .cache/corpus                                     what it has to beat
    python -m misa_vllm.train.export .cache/second --data .cache/corpus --compare --packed FOLDER

`--smoke 4` takes a few steps of every stage at its full length first. The order of reading: `plan` (what is trained
when), `tasks` (on what), `model` (the model), `run` (the loop).
"""
