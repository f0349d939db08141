"""Training of the project's own small DSA model, in plain PyTorch on one GPU.

    python -m misa_vllm.train.corpus .cache/corpus                             text and tokenizer, no GPU
    python -m misa_vllm.train.ngram .cache/corpus > .cache/ngram.json          what the model has to beat
    python -m misa_vllm.train --data .cache/corpus --out .cache/smoke --smoke 3 --minutes 18 --workers 12
    python -m misa_vllm.train --data .cache/corpus --out .cache/first --minutes 9 --until dense-16k --workers 12
    python -m misa_vllm.train --data .cache/corpus --out .cache/second --minutes 9 --resume .cache/first --workers 12
    python -m misa_vllm.train.evaluate .cache/second --data .cache/corpus --out .cache/figures.json
    python -m misa_vllm.train.export .cache/second --data .cache/corpus --packed misa_vllm/data/trained \\
        --figures .cache/figures.json
    python -m misa_vllm.train.plot .cache/second/curves.jsonl curves.png

New indexers for the model that is shipped, a few of whose heads do for a query:

    python -m misa_vllm.train.corpus .cache/corpus --tokenizer misa_vllm/data/trained/tokenizer.json
    python -m misa_vllm.train --plan indexer --new-indexers --resume misa_vllm/data/trained --concentrate 0.05 \\
        --data .cache/corpus --out .cache/indexers --minutes 4 --workers 12

The third of the upper commands trains nothing: it runs a few steps of every stage at its full length, prints tokens per
second and memory, and fails where the plan would not fit into the time. Training needs the folder's tokenizer.json,
train.bin and heldout.bin alone, which is what bundle.tar.xz holds. The order of reading: `plan` (what is trained when),
`tasks` (on what), `model` (the model), `run` (the loop).
"""
