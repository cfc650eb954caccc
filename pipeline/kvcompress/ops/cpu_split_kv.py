"""One query a head over many slots on a CPU, spread over all cores.

torch's fused attention gives each KV head of each row to one core. A decode step has few of them: three heads on two
cores take as long as four, one head leaves a core idle. Cutting every head's slots into equal parts makes enough pieces
for all cores; the scores of a head's parts share one softmax, and their weighted values are summed. The arithmetic is
that of plain attention, only in another order.
"""

import torch
from torch import Tensor

# Below this many slots the extra steps cost more than the idle core (measured on 2 cores: even at about 2,000).
WORTHWHILE = 3000


def parts_for(query: Tensor, keys: Tensor, filled: int) -> int:
    """Into how many parts to cut the slots of `keys`, `[batch, kv_head, slot, head_dim]`; 1 for leaving them whole."""
    if filled < WORTHWHILE or keys.device.type != "cpu" or keys.dtype != torch.float32 or query.shape[3] != 1:
        return 1
    threads, pieces = torch.get_num_threads(), keys.shape[0] * keys.shape[1]
    rounds = -(-pieces // threads)
    if rounds * threads < 1.25 * pieces:  # the cores are busy as it is
        return 1
    parts = 1
    while parts < threads and keys.shape[2] % (2 * parts) == 0:
        parts *= 2
    return parts


def attend_spread(query: Tensor, keys: Tensor, values: Tensor, filled: int, scale: float | None, parts: int) -> Tensor:
    """Attention of query `[batch, kv_head, group, 1, head_dim]` over the first `filled` slots of a whole block."""
    batch, heads, group, _, size = query.shape
    slots, pieces = keys.shape[2], batch * heads * parts
    rows = (query * (size**-0.5 if scale is None else scale)).view(batch, heads, 1, group, size)
    rows = rows.expand(batch, heads, parts, group, size).reshape(pieces, group, size)
    scores = torch.bmm(rows, keys.view(pieces, slots // parts, size).transpose(1, 2))
    scores = scores.view(batch, heads, parts, group, -1).transpose(2, 3).reshape(batch, heads, group, slots)
    scores[..., filled:] = float("-inf")
    weights = torch.softmax(scores, dim=-1).view(batch, heads, group, parts, -1).transpose(2, 3)
    out = torch.bmm(weights.reshape(pieces, group, -1), values.view(pieces, slots // parts, -1))
    return out.view(batch, heads, parts, group, -1).sum(dim=2).unsqueeze(3)
