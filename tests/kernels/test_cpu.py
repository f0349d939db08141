"""What only the CPU kernels do: writing keys, sparse attention, threads, variants and checks."""

import os
import subprocess
import sys

import pytest
import torch

from misa_vllm import reference
from misa_vllm.index_cache import PAGE_BYTES, PAGE_TOKENS
from misa_vllm.rows import QueryRows

from .cases import WILD_PAGE, make_case, random_heads

LENGTHS = [[0, 1, 64, 65, 300], [500, 411], [700]]


@pytest.fixture
def threads():
    """Sets torch's thread count, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------- writing keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_writes_the_references_bytes(cpu_kernels, dtype, magnitude):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(300, 256, generator=generator).to(dtype)[:, :128] * magnitude  # rows are not adjacent
    k[7] = 0.0
    k[8, :3] = torch.tensor([448.0, -448.0, 1.0])  # exactly representable extremes
    k[9] = k[9] * torch.logspace(-12, 0, 128).to(dtype)  # down into fp8's subnormals
    slots = torch.randperm(10 * PAGE_TOKENS, generator=generator)[:290]
    slots[::11] = -1
    caches = [torch.full((10, PAGE_BYTES + 64), 0xFF, dtype=torch.uint8)[:, :PAGE_BYTES] for _ in range(2)]
    cpu_kernels.write_index_keys(k, caches[0], slots)
    reference.write_index_keys(k, caches[1], slots)
    assert torch.equal(*caches)


def test_keys_that_are_not_finite_do_no_harm(cpu_kernels):
    k = torch.ones(3, 128)
    k[0, 5], k[1, 5] = torch.nan, torch.inf
    cache = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)
    cpu_kernels.write_index_keys(k, cache, torch.tensor([0, 1, 2]))
    want = torch.zeros_like(cache)
    reference.write_index_keys(k[2:], want, torch.tensor([2]))
    assert torch.equal(cache[0, 2 * 128 : 3 * 128], want[0, 2 * 128 : 3 * 128])


# ---------------------------------------------------------------- sparse attention


def make_attention(heads, kv_lora_rank, rope, dtype, k=70, seed=0):
    """q, kv_cache, rows, tokens: every cache row that no token names is NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = make_case([[300, 299, 1], [65, 64]], heads=1).rows
    width = kv_lora_rank + rope
    num_pages = 12
    kv_cache = torch.full((num_pages, PAGE_TOKENS, width + 8), torch.nan, dtype=dtype)[..., :width]
    tokens = torch.full((len(rows), k), -1, dtype=torch.int32)
    for m, (request, visible) in enumerate(zip(rows.request.tolist(), rows.visible.tolist())):
        count = min(visible, k - 3)
        columns = torch.randperm(k, generator=generator)[:count]
        tokens[m, columns] = torch.randperm(visible, generator=generator)[:count].to(torch.int32)
        for token in tokens[m][tokens[m] >= 0].tolist():
            page = int(rows.block_table[request, token // PAGE_TOKENS])
            if kv_cache[page, token % PAGE_TOKENS].isnan().any():
                kv_cache[page, token % PAGE_TOKENS] = torch.randn(width, generator=generator).to(dtype)
    q = (torch.randn(len(rows), heads, width, generator=generator) * 2).to(dtype)
    return q, kv_cache, rows, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_lora_rank, rope", [(128, 512, 64), (5, 64, 16), (1, 8, 8), (3, 40, 24), (16, 128, 0)]
)
def test_attends_to_the_selected_tokens(cpu_kernels, dtype, heads, kv_lora_rank, rope):
    q, kv_cache, rows, tokens = make_attention(heads, kv_lora_rank, rope, dtype)
    scale = (kv_lora_rank + rope) ** -0.5
    out = cpu_kernels.sparse_mla_attention(q, kv_cache, rows, tokens, scale, kv_lora_rank)
    assert out.dtype == dtype
    for m in range(len(rows)):
        positions = tokens[m][tokens[m] >= 0].long()
        pages = rows.block_table[int(rows.request[m])][positions // PAGE_TOKENS].long()
        kv = kv_cache[pages, positions % PAGE_TOKENS].double()
        logits = q[m].double() @ kv.T * scale
        weights = torch.softmax(logits, dim=-1)
        want = weights @ kv[:, :kv_lora_rank]
        # a logit's rounding error moves its weight by the same relative amount; the sums add theirs
        logit_error = (q[m].double().abs() @ kv.abs().T * scale).max() * (kv.shape[1] + 4) * 2.0**-24
        error = 2 * logit_error + (len(positions) + 8) * 2.0**-24
        tolerance = weights @ kv[:, :kv_lora_rank].abs() * error
        if dtype == torch.bfloat16:
            tolerance = tolerance + want.abs() * 2.0**-8
        assert ((out[m].double() - want).abs() <= tolerance).all()


def test_a_row_without_tokens_is_zero(cpu_kernels):
    q, kv_cache, rows, tokens = make_attention(4, 64, 16, torch.float32)
    tokens[2] = -1
    out = cpu_kernels.sparse_mla_attention(q, kv_cache, rows, tokens, 0.1, 64)
    assert (out[2] == 0).all() and not out.isnan().any()


def test_large_logits_do_not_overflow(cpu_kernels):
    """The first token's weight is far below the smallest float once the last one is seen, and the reverse."""
    q, kv_cache, rows, tokens = make_attention(2, 64, 16, torch.float32)
    for sign in (1, -1):
        out = cpu_kernels.sparse_mla_attention(q * 1e4 * sign, kv_cache, rows, tokens, 1.0, 64)
        want = reference.sparse_mla_attention(q * 1e4 * sign, kv_cache, rows, tokens, 1.0, 64)
        assert torch.allclose(out, want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- threads and batches


def run_everything(kernels, case, attention, pool_block=64):
    """The results of every operation, in one list."""
    heads = kernels.route_heads(case.q, case.gates, case.index_cache, case.rows, 8, pool_block)
    results = [heads]
    for routed in (None, heads):
        results.append(torch.full((len(case), 100), -7, dtype=torch.int32))
        kernels.select_tokens(case.q, case.gates, routed, case.index_cache, case.rows, 100, results[-1])
    results.append(torch.full((len(case), 50), -7, dtype=torch.int32))
    kernels.rerank_tokens(case.q, case.gates, results[-2], case.index_cache, case.rows, 50, results[-1])
    results.append(kernels.sparse_mla_attention(*attention, 0.1, 512))
    return results


def test_thread_counts_give_the_same_bits(cpu_kernels, threads):
    case, attention = make_case(LENGTHS), make_attention(24, 512, 64, torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run_everything(cpu_kernels, case, attention))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_attention_rows_alone_give_the_same_bits(cpu_kernels, threads):
    threads(2)
    q, kv_cache, rows, tokens = make_attention(24, 512, 64, torch.float32)
    batch = cpu_kernels.sparse_mla_attention(q, kv_cache, rows, tokens, 0.1, 512)
    for m in range(len(rows)):
        part = slice(m, m + 1)
        alone = cpu_kernels.sparse_mla_attention(q[part], kv_cache, rows[part], tokens[part], 0.1, 512)
        assert torch.equal(alone[0], batch[m])


def test_many_rows_in_several_batches(cpu_kernels):
    """More scores than one batch holds: every batch must write its own rows."""
    visible = list(range(2500, 2500 + 900))
    case = make_case([visible], heads=32)
    heads = random_heads(case, 1)
    out = torch.full((len(case), 64), -7, dtype=torch.int32)
    cpu_kernels.select_tokens(case.q, case.gates, heads, case.index_cache, case.rows, 64, out)
    for m in (0, 17, 450, 898, 899):
        alone = torch.full((1, 64), -7, dtype=torch.int32)
        row = case.row(m)
        cpu_kernels.select_tokens(row.q, row.gates, heads[m : m + 1], row.index_cache, row.rows, 64, alone)
        assert torch.equal(alone[0], out[m])
    assert (out >= 0).all()


def test_strided_addressing(cpu_kernels):
    """Rows of any stride, also in the last dimension of tables and vectors."""
    case = make_case(LENGTHS)
    want = torch.full((len(case), 100), -7, dtype=torch.int32)
    cpu_kernels.select_tokens(case.q, case.gates, None, case.index_cache, case.rows, 100, want)

    def spread(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 3), WILD_PAGE, dtype=tensor.dtype)
        wide[..., ::3] = tensor
        return wide[..., ::3]

    rows = QueryRows(*(spread(t) for t in (case.rows.block_table, case.rows.request, case.rows.visible)), 700)
    q = torch.zeros(len(case), 70, 160, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :64, :128]
    q.copy_(case.q)
    gates = torch.zeros(len(case), 80)[:, :64].copy_(case.gates)
    out = spread(torch.full_like(want, -7))
    cpu_kernels.select_tokens(q, gates, None, case.index_cache, rows, 100, out)
    assert torch.equal(out, want)


# ---------------------------------------------------------------- instruction sets

PRINT_SELECTION = """
import torch
from misa_vllm.kernels import cpu
from tests.kernels.cases import make_case
from tests.kernels.test_cpu import make_attention, run_everything
case = make_case([[0, 1, 64, 65, 300], [500, 411], [9000]], exact=True)
*selected, attended = run_everything(cpu, case, make_attention(9, 512, 64, torch.float32))
print(*[hash(tuple(t.flatten().tolist())) for t in selected])
print(attended.double().sum().item())
"""


def run_variant(variant):
    environment = {**os.environ, "MISA_CPU_ISA": variant, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", PRINT_SELECTION], env=environment, capture_output=True, text=True, timeout=120
    )


def test_variants_agree_on_exact_scores(cpu_kernels):
    outputs = {}
    for variant in ("generic", "avx2", "avx512"):
        finished = run_variant(variant)
        if finished.returncode == 0:
            outputs[variant] = finished.stdout.splitlines()
        else:
            assert "does not run on this machine" in finished.stderr, finished.stderr
    generic_hashes, generic_sum = outputs.pop("generic")
    for hashes, attended in outputs.values():
        assert hashes == generic_hashes
        assert float(attended) == pytest.approx(float(generic_sum), rel=1e-4)


def test_an_unknown_variant_is_refused(cpu_kernels):
    assert "MISA_CPU_ISA=sse9 does not run on this machine: choose generic, avx2" in run_variant("sse9").stderr


# ---------------------------------------------------------------- checks


def break_case(case, what):
    """Arguments of select_tokens with one thing wrong."""
    rows = case.rows
    arguments = {
        "q": case.q, "gates": case.gates, "heads": random_heads(case, 8), "index_cache": case.index_cache,
        "rows": rows, "k": 100, "out": torch.zeros(len(case), 100, dtype=torch.int32),
    }  # fmt: skip
    broken = {
        "q": {"q": case.q.float()},
        "gates": {"gates": case.gates[:, :5]},
        "heads": {"heads": arguments["heads"].long()},
        "index_cache": {"index_cache": case.index_cache[:, :8000]},
        "rows.request": {"rows": QueryRows(rows.block_table, rows.request[:2], rows.visible, 700)},
        "rows.visible": {"rows": QueryRows(rows.block_table, rows.request, rows.visible.long(), 700)},
        "k": {"k": 0},
        "out": {"out": torch.zeros(len(case), 99, dtype=torch.int32)},
    }
    return arguments | broken[what]


@pytest.mark.parametrize("what", ["q", "gates", "heads", "index_cache", "rows.request", "rows.visible", "k", "out"])
def test_a_wrong_argument_is_named(cpu_kernels, what):
    with pytest.raises(ValueError, match=f"^select_tokens: {what} [^\n]*$"):
        cpu_kernels.select_tokens(**break_case(make_case(LENGTHS), what))


@pytest.mark.parametrize("what", ["page", "request", "visible", "head", "slot", "candidate"])
def test_values_that_would_read_elsewhere_are_refused(cpu_kernels, what):
    case = make_case([[300]])
    rows, out = case.rows, torch.zeros(1, 100, dtype=torch.int32)
    heads = random_heads(case, 8)
    with pytest.raises(RuntimeError, match={"page": "block_table entry", "slot": "slot_mapping entry"}.get(what, what)):
        if what == "page":
            rows.block_table[0, 2] = WILD_PAGE
        elif what == "request":
            rows.request[0] = 1
        elif what == "visible":
            rows.visible[0] = 10_000
        elif what == "head":
            heads[0, 3] = 64
        elif what == "slot":
            cpu_kernels.update_page_means(case.index_cache, torch.tensor([WILD_PAGE]))
        elif what == "candidate":
            candidates = torch.arange(201, 401, dtype=torch.int32).unsqueeze(0)
            cpu_kernels.rerank_tokens(case.q, case.gates, candidates, case.index_cache, rows, 100, out)
        cpu_kernels.select_tokens(case.q, case.gates, heads, case.index_cache, rows, 100, out)
