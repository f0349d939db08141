"""Makes stock vLLM's selections unique."""

import torch


def settle(scores, first, end, selected):
    """Of tokens that equal the worst score of stock's `selected` [M, k], let the earlier ones win, and sort them all.

    Stock's top-k leaves both open. Row m has the scores of columns first[m] .. end[m] - 1, and tokens count from there.

    Returns how many rows had a token that is not among their k best, an int64 scalar: nothing settles those. It reads
    nothing outside of the scores, whatever `selected` holds.
    """
    k = selected.shape[1]
    columns = torch.arange(scores.shape[1], device=scores.device)
    first, end = first.view(-1, 1), end.view(-1, 1)
    seen = (columns >= first) & (columns < end)
    of_selected = scores.gather(1, (first + selected.long()).clamp(0, scores.shape[1] - 1))
    worst = torch.where(selected >= 0, of_selected, float("inf")).amin(dim=1, keepdim=True)
    above, equal = seen & (scores > worst), seen & (scores == worst)
    count = (end - first).clamp(min=0, max=k)
    room = count - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    place = torch.where(keep, keep.cumsum(dim=1, dtype=torch.int32) - 1, k).clamp(max=k)
    settled = selected.new_full((len(selected), k + 1), -1)
    settled.scatter_(1, place.long(), (columns - first).to(selected.dtype))
    selected.copy_(settled[:, :k])
    return ((count > 0) & (room < 1)).sum()
