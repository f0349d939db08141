"""Declarative checks of an operator's tensors: shape, dtype, device and contiguity, named in the message."""

import sys
from dataclasses import dataclass

import torch

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_BYTES, PAGE_TOKENS, STOCK_PAGE_BYTES
from misa_vllm.rows import QueryRows

Dim = int | str | range


def at_least(size: int) -> range:
    """A dimension of `size` or more."""
    return range(size, sys.maxsize)


class TensorChecks:
    """Checks the tensors of one call; sizes named by a symbol must agree among them.

    >>> check = TensorChecks("select_tokens", "cpu")
    >>> check("q", q, ("M", "H", 128), torch.float8_e4m3fn)
    >>> check("gates", gates, ("M", "H"), torch.float32)
    """

    def __init__(self, operator: str, device_type: str) -> None:
        self.operator = operator
        self.device_type = device_type
        self.sizes: dict[str, tuple[int, str]] = {}

    def __call__(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[Dim, ...],
        *dtypes: torch.dtype,
        contiguous_last: bool = True,
    ) -> None:
        """Check one tensor.

        Args:
            name: what the message calls it.
            shape: per dimension an exact size, a symbol, or a range (`at_least(8448)`).
            dtypes: the dtypes it may have.
            contiguous_last: whether the last dimension must have stride 1.

        Raises:
            ValueError: in one line, what is wrong and what was expected.
        """
        if tensor.device.type != self.device_type:
            self._fail(name, f"is on {tensor.device.type}, move it to {self.device_type}")
        if tensor.dtype not in dtypes:
            self._fail(name, f"is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.dim() != len(shape):
            self._fail(name, f"has shape {list(tensor.shape)}, expected {len(shape)} dimensions")
        for i, (size, wanted) in enumerate(zip(tensor.shape, shape)):
            if isinstance(wanted, str):
                wanted, where = self.sizes.setdefault(wanted, (size, name))
                if size != wanted:
                    self._fail(name, f"has size {size} in dimension {i}, but {where} has {wanted}")
            elif isinstance(wanted, range):
                if size < wanted.start:
                    self._fail(name, f"has size {size} in dimension {i}, expected at least {wanted.start}")
            elif size != wanted:
                self._fail(name, f"has size {size} in dimension {i}, expected {wanted}")
        if contiguous_last and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self._fail(name, f"has stride {tensor.stride(-1)} in its last dimension, pass it contiguous")

    def value(self, name: str, holds: bool, rule: str) -> None:
        """Check something that is not a tensor's layout: raises ValueError "name rule" unless `holds`."""
        if not holds:
            self._fail(name, rule)

    def _fail(self, name: str, problem: str) -> None:
        raise ValueError(f"{self.operator}: {name} {problem}")


@dataclass(frozen=True)
class Demands:
    """What one implementation asks of its tensors beyond the contract."""

    device_type: str
    max_heads: int
    query_alignment: int
    """Bytes; every head's query starts at a multiple of it."""
    page_alignment: int
    """Bytes; every page starts at a multiple of it."""
    contiguous_lists: bool
    """Whether lists of numbers (slots, tables, heads, tokens) must be contiguous in their last dimension."""


class IndexerChecks(TensorChecks):
    """The arguments of the operations of `misa_vllm.kernels.Kernels`. All methods raise ValueError, one line."""

    def __init__(self, operator: str, demands: Demands) -> None:
        super().__init__(operator, demands.device_type)
        self.demands = demands

    def numbers(
        self, name: str, tensor: torch.Tensor, shape: tuple[Dim, ...], dtype: torch.dtype = torch.int32
    ) -> None:
        """Check a list of slots, page ids, heads or tokens."""
        self(name, tensor, shape, dtype, contiguous_last=self.demands.contiguous_lists)

    def queries(self, q: torch.Tensor, gates: torch.Tensor) -> None:
        self("q", q, ("M", "H", INDEX_HEAD_DIM), torch.float8_e4m3fn)
        self._aligned("q", "heads", self.demands.query_alignment, q.data_ptr(), q.stride(0), q.stride(1))
        self("gates", gates, ("M", "H"), torch.float32)
        heads, most = q.shape[1], self.demands.max_heads
        self.value("q", 1 <= heads <= most, f"has {heads} heads, expected 1 .. {most}")

    def cache(self, index_cache: torch.Tensor, page_bytes: int) -> None:
        self("index_cache", index_cache, ("pages", at_least(page_bytes)), torch.uint8)
        alignment = self.demands.page_alignment
        self._aligned("index_cache", "pages", alignment, index_cache.data_ptr(), index_cache.stride(0))

    def rows(self, rows: QueryRows) -> None:
        self.numbers("rows.block_table", rows.block_table, ("R", "W"))
        self.numbers("rows.request", rows.request, ("M",))
        self.numbers("rows.visible", rows.visible, ("M",))

    def page_means(self, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Arguments of `update_page_means` and `update_signed_means`."""
        self.numbers("slot_mapping", slot_mapping, ("T",), torch.int64)
        self.cache(index_cache, PAGE_BYTES)

    def route(self, q, gates, index_cache, rows: QueryRows, active_heads: int, pool_block: int) -> None:
        """Arguments of `route_heads` and `route_heads_by_signs`."""
        self.queries(q, gates)
        self.cache(index_cache, PAGE_BYTES)
        self.rows(rows)
        heads = q.shape[1]
        self.value("active_heads", 1 <= active_heads <= heads, f"{active_heads} is not in 1 .. {heads}")
        is_whole_pages = pool_block > 0 and pool_block % PAGE_TOKENS == 0
        self.value("pool_block", is_whole_pages, f"{pool_block} is not a positive multiple of {PAGE_TOKENS}")

    def select(self, q, gates, heads, index_cache, rows: QueryRows, k: int, out) -> None:
        """Arguments of `select_tokens`."""
        self.queries(q, gates)
        if heads is not None:
            self.numbers("heads", heads, ("M", at_least(1)))
        self._selection(index_cache, rows, k, out)

    def rerank(self, q, gates, candidates, index_cache, rows: QueryRows, k: int, out) -> None:
        """Arguments of `rerank_tokens`."""
        self.queries(q, gates)
        self.numbers("candidates", candidates, ("M", at_least(k)))
        self._selection(index_cache, rows, k, out)

    def _selection(self, index_cache, rows: QueryRows, k: int, out) -> None:
        self.cache(index_cache, STOCK_PAGE_BYTES)
        self.rows(rows)
        self.value("k", k >= 1, f"{k} is not positive")
        self.numbers("out", out, ("M", at_least(k)))

    def _aligned(self, name: str, parts: str, alignment: int, *byte_offsets: int) -> None:
        holds = all(offset % alignment == 0 for offset in byte_offsets)
        self.value(name, holds, f"has {parts} that do not start at multiples of {alignment} bytes")
