"""What a step's queries may see: the addressing that every kernel of this package takes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryRows:
    """Addressing of M query tokens ("rows") that belong to R requests.

    A row at position t of its request sees the keys 0 .. t, so `visible = t + 1`; key s of the request lies
    in page `block_table[request, s // 64]` at slot `s % 64`. A row with `visible = 0` is padding.
    Entries of `block_table` past a request's last page hold anything and are never read.
    """

    block_table: torch.Tensor
    """[R, W] int32, page ids of each request."""
    request: torch.Tensor
    """[M] int32, the row of `block_table` that a query belongs to."""
    visible: torch.Tensor
    """[M] int32, how many keys a query sees."""
    max_visible: int
    """Upper bound of `visible` known on the host; bounds grids, never results."""
    min_visible: int = 0
    """Lower bound of `visible` known on the host; lets a caller leave out work that no row needs."""

    def __len__(self) -> int:
        return self.visible.shape[0]

    def __getitem__(self, rows: slice) -> "QueryRows":
        """The same requests with a slice of the rows."""
        return QueryRows(self.block_table, self.request[rows], self.visible[rows], self.max_visible, self.min_visible)

    def take(self, numbers: torch.Tensor) -> "QueryRows":
        """The same requests with the rows whose numbers [n] int64 are given."""
        return QueryRows(
            self.block_table, self.request[numbers], self.visible[numbers], self.max_visible, self.min_visible
        )
