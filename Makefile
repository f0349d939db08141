# One command from a fresh clone to a running server. `make help` lists what can be set.
PYTHON ?= python3
VENV   ?= .venv
DEVICE ?= auto
# the project's trained model where the package has its weights, else one with random weights
MODEL  ?= $(if $(wildcard misa_vllm/data/trained/weights.safetensors),.models/trained,.models/tiny)
PORT   ?= 8000
OPTIONS ?= {}
ARGS   ?=
TESTS  ?= tests

# Memory for the KV cache on CPU, GiB; vLLM does not send usage statistics unless you set this to 0.
export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1

BIN := $(abspath $(VENV))/bin
# Our models have a tokenizer and chat template of their own, and more positions than a laptop has memory for.
# Without a GPU they compute in float32: most CPUs emulate bfloat16 products, at several times the cost.
ifneq ($(filter .models/tiny .models/trained,$(MODEL)),)
MODEL_ARGS := --tokenizer-mode hf --max-model-len 32768
ifeq ($(wildcard /dev/nvidia0),)
MODEL_ARGS += --dtype float32
endif
endif

# the trained model can find what the document says, so the demo checks its answer
ifeq ($(MODEL),.models/trained)
DEMO_ARGS := --needle
endif

.DEFAULT_GOAL := help
.PHONY: help install model serve demo test clean

help:
	@echo "make serve    install what is missing and serve a model with --attention-backend misa"
	@echo "make demo     the same, ask about a long document, print speed and recall, stop the server"
	@echo "make test     install what is missing and run the tests"
	@echo "make clean    remove $(VENV), .models and build products"
	@echo
	@echo "MODEL=$(MODEL)  PORT=$(PORT)  DEVICE=auto|cpu|cuda  PYTHON=$(PYTHON)  VENV=$(VENV)"
	@echo "OPTIONS='{\"policy\": \"hierarchical\"}'   MISA's options (README)"
	@echo "ARGS='--max-num-seqs 8'                  more options of vllm serve"
	@echo "TESTS='tests/test_policies.py'           what make test runs"

install:
	@$(PYTHON) misa_vllm/install.py $(VENV) --device $(DEVICE)

ifneq ($(filter .models/tiny .models/trained,$(MODEL)),)
model: $(MODEL)/config.json
endif
model: install

.models/tiny/config.json: misa_vllm/models/tiny.py misa_vllm/models/folder.py misa_vllm/data/us_constitution.txt | install
	@$(BIN)/python -m misa_vllm.models.tiny .models/tiny

.models/trained/config.json: misa_vllm/models/trained.py misa_vllm/models/folder.py $(wildcard misa_vllm/data/trained/*) | install
	@$(BIN)/python -m misa_vllm.models.trained .models/trained

serve: model
	@PATH=$(BIN):$$PATH exec $(BIN)/vllm serve $(MODEL) --attention-backend misa --port $(PORT) $(MODEL_ARGS) \
		--additional-config '{"misa": $(OPTIONS)}' $(ARGS)

demo: model
	@PATH=$(BIN):$$PATH exec $(BIN)/python -m misa_vllm.demo $(MODEL) $(DEMO_ARGS) --options '$(OPTIONS)' -- $(MODEL_ARGS) $(ARGS)

test: install
	@PATH=$(BIN):$$PATH exec $(BIN)/python -m pytest $(TESTS) $(ARGS)

clean:
	rm -rf $(VENV) .models build
	find misa_vllm -name '*.so' -delete
