"""What the seam does around vLLM's fused path on CUDA, on a CPU with stand-ins for what needs a GPU."""

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode

from misa_vllm import metrics, reference


@pytest.fixture(scope="module")
def cuda():
    """The module, with vLLM's as an engine imports it: GPU tests of this process may need its decorators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
        from misa_vllm.seam import cuda

    return cuda


@pytest.fixture(autouse=True)
def nothing_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(("decodes", "least"), [(0, 1), (1, 0)])
def test_least_visible_is_known_for_prefills_only(cuda, monkeypatch, decodes, least):
    """The host knows an upper bound of a decode's length alone: drafts may have been rejected."""
    counted = []
    built = Namespace(num_decodes=decodes, num_prefills=2 - decodes)
    monkeypatch.setattr(cuda.DeepseekV32IndexerMetadataBuilder, "build", lambda *args: built)
    monkeypatch.setattr(metrics, "count_queries", lambda settings, *step: counted.append(step))
    builder = object.__new__(cuda.MetadataBuilderWithRows)
    builder.settings = None
    starts = int32(0, 1, 11, 12)
    common = Namespace(
        query_start_loc="on the device",
        query_start_loc_cpu=starts,
        seq_lens_cpu_upper_bound=int32(70, 50, 1, 999),  # may be longer than the batch
    )
    metadata = builder.build(0, common)
    assert metadata is built and metadata.query_start_loc == "on the device"
    assert metadata.min_visible == least
    ((first, last, decoding),) = counted
    assert decoding.tolist() == [number < decodes for number in range(3)]
    assert np.array_equal(first, [70, 41, 1]) and np.array_equal(last, [70, 50, 1])
    assert builder.build_for_cudagraph_capture(common) is built
    assert len(counted) == 1, "what graphs are captured with was counted"
    builder.build(0, common)
    assert len(counted) == 2


# ---------------------------------------------------------------- scoring


class Indexer:
    """Stands in for a layer's indexer and notes what it is asked for."""

    observer = None
    kernels = reference

    def __init__(self):
        self.settings = Namespace(routes_heads=True, topk=4, exact_decode=False)
        self.calls = []

    def update_statistics(self, index_cache, slot_mapping):
        self.calls.append(("statistics", len(slot_mapping)))

    def select(self, q, gates, index_cache, rows, out, exact=False):
        assert len(q) == len(gates) == len(rows) == len(out)
        self.calls.append(("exact" if exact else "select", rows))

    def reserve(self, max_rows, max_visible, device):
        self.calls.append(("reserve", max_rows, max_visible))


class Step:
    """The fused path's layers, and calls of its scoring function in forward contexts."""

    def __init__(self, cuda, monkeypatch):
        self.cuda = cuda
        self.buffer = torch.zeros(10, 4, dtype=torch.int32)
        self.layers = {name: Namespace(indexer=Indexer(), index_cache=torch.zeros(4, 8960)) for name in "ab"}
        self.metadata = Namespace(
            query_start_loc=int32(0, 5, 6),
            slot_mapping=torch.arange(8),
            seq_lens=int32(9, 70),
            block_table=torch.zeros(2, 4, dtype=torch.int32),
            max_seq_len=70,
            min_visible=5,
            prefill=None,
            num_prefills=1,
            num_decode_tokens=1,
        )
        self.stock_calls = 0
        monkeypatch.setattr(cuda.attention, "sparse_attn_indexer", self.stock)
        monkeypatch.setattr(cuda.attention.DeepseekV32Indexer, "indexer_cache_cls", None)
        monkeypatch.setattr(cuda, "get_forward_context", lambda: self.context)
        cuda.extend_fused_indexer(object)
        self.begin()

    def stock(self, *args, **kwargs):
        assert self.layers["a"].indexer.settings.exact_decode, "stock scored"
        self.stock_calls += 1
        return self.buffer

    def begin(self, attn_metadata="as it is"):
        """A new forward context."""
        metadata = dict.fromkeys(self.layers, self.metadata) if attn_metadata == "as it is" else attn_metadata
        mode = CUDAGraphMode.NONE
        self.context = Namespace(
            no_compile_layers=self.layers, attn_metadata=metadata, cudagraph_runtime_mode=mode
        )

    def score(self, layer, dense_layer=""):
        q, gates = torch.zeros(8, 64, 128), torch.zeros(8, 64)
        hidden = torch.zeros(8, 16)
        result = self.cuda.attention.sparse_attn_indexer(
            hidden, layer, None, q, None, None, gates, 128, "ue8m0", 4, 128, 1000, 2000, self.buffer,
            dense_mha_metadata_layer_name=dense_layer,
        )  # fmt: skip
        assert result is self.buffer
        return self.layers[layer].indexer.calls


@pytest.fixture
def step(cuda, monkeypatch):
    return Step(cuda, monkeypatch)


def test_layers_share_the_rows_of_a_step(step):
    (statistics, (_, rows)), (_, (_, again)) = step.score("a"), step.score("b")
    assert statistics == ("statistics", 8)
    assert rows.visible.tolist() == [5, 6, 7, 8, 9, 70, 0, 0]
    assert rows.request[:6].tolist() == [0] * 5 + [1]
    assert (rows.max_visible, rows.min_visible) == (70, 5)
    assert rows.visible.data_ptr() == again.visible.data_ptr()


def test_passes_of_a_draft_see_their_own_lengths(step):
    """They share one metadata object, whose lengths the device advances between them."""
    step.score("a")
    step.metadata.seq_lens += 1
    step.begin()
    rows = step.score("a")[-1][1]
    assert rows.visible.tolist() == [6, 7, 8, 9, 10, 71, 0, 0]


def test_a_captured_step_knows_no_lengths(step, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rows = step.score("a")[-1][1]
    assert (rows.max_visible, rows.min_visible) == (1000, 0)


def test_statistics_are_kept_where_attention_is_dense(step):
    dense = Namespace(prefill=Namespace(use_dense_mha=True), num_decode_tokens=0)
    step.begin({"a": step.metadata, "dense": dense})
    assert step.score("a", "dense") == [("statistics", 8)]
    dense.num_decode_tokens = 1
    assert [name for name, *_ in step.score("a", "dense")[1:]] == ["statistics", "select"]


def test_exact_decode_leaves_decodes_to_stock(step):
    for layer in step.layers.values():
        layer.indexer.settings.exact_decode = True
    (_, (decoded, rows), (routed, others)) = step.score("a")
    assert (decoded, rows.visible.tolist()) == ("exact", [5])
    assert (routed, others.visible.tolist()) == ("select", [6, 7, 8, 9, 70, 0, 0])
    assert step.stock_calls == 0
    step.metadata.num_prefills = 0
    assert step.score("b") == [("statistics", 8)] and step.stock_calls == 1
    step.begin(None)
    assert step.score("b")[1:] == [("reserve", 10, 1000)] and step.stock_calls == 2


def test_profiling_reserves_and_scores_nothing(step, monkeypatch):
    exchange = []
    monkeypatch.setattr(step.cuda, "_reserve_row_shard_exchange_transient", lambda *args: exchange.append(args))
    step.begin(None)
    assert step.score("a") == [("reserve", 10, 1000)]
    assert len(exchange) == 1


def test_a_module_imported_too_early_is_refused(cuda, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    cuda.require_breaks()
    monkeypatch.setattr(cuda.attention.DeepseekV32Attention, "_sparse_indexer_and_attn", lambda self: None)
    with pytest.raises(RuntimeError, match="imported before VLLM_USE_BREAKABLE_CUDAGRAPH"):
        cuda.require_breaks()
