"""The small DSA model as it is trained: DeepseekV32ForCausalLM as vLLM computes it, in plain PyTorch.

Parameters carry the checkpoint's names, so a state dict is a Hugging Face checkpoint up to the output matrix, which is
the embedding. What differs from inference is only how attention is written: keys and values per head instead of the
latent space, and a mask over all keys instead of gathered ones.

Memory at the default size (4 layers, hidden 256, 8 heads) with bf16 autocast: a layer keeps about 14 KB a token for
its backward pass (q, k, v padded and the attention's output at 2 KB each, the latents, norms and MLP the rest), so
131072 tokens of dense training keep 7 GB, and sparse training 1 GB more, the selected tokens. Freed as soon as used:
`LOSS_CHUNK` tokens' logits in float32, 0.3 GB, three times over; `MASKED_PAIRS` of a mask in bf16, 0.3 GB;
`kernels.scored_at_once` pairs of scores and their top-k, 1 GB each; `KL_PAIRS` of every head's products, 0.5 GB in
bf16, 1 GB in float32, three times over; `QUERIES_AT_ONCE` index queries with their FP8 images, 0.3 GB.

Sources: DeepSeek-V3.2 report, section 2 (DSA, eq. 1-4); MLA, DeepSeek-V2 report, section 2.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from misa_vllm.reference import quantize_fp8
from misa_vllm.train import kernels
from misa_vllm.train.size import DENSE, SPARSE, ModelSize

LOSS_CHUNK = 16384  # tokens whose logits exist at once
MASKED_PAIRS = 2**27  # (query, key) pairs that attend through one mask
QUERIES_AT_ONCE = 2048  # of the indexer, in the selection
KL_PAIRS = 2**22  # (sampled query, key) pairs of the indexer's loss at once
EMBEDDING_STD = 0.5  # times hidden ** -0.5: the first logits' spread
# of the first layer's heads that look back at their start: how many times an embedding's spread its common component
# is, and the logit that the fastest pair of RoPE dimensions gives the right distance
COMMON_COMPONENT = 8.0
NEIGHBOUR_LOGIT = 12.0
GATE_START = 0.5  # every gate's weight for that component, which is 2 to 6 in the attention's inputs
COUNTED_KEYS = 256  # of a query, on which it is counted how many heads matter to it


def remade(function, *arguments):
    """The result of `function`, whose intermediate tensors the backward pass computes again instead of keeping."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------- positions


def rope_tables(size: ModelSize, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, rope/2] float32 of positions [N]."""
    half = torch.arange(0, size.rope_head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = size.rope_theta ** -(half / size.rope_head_dim)
    angles = torch.outer(positions.float(), frequency)
    return angles.cos(), angles.sin()


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over neighbours (2i, 2i + 1), as MLA has it; x [..., N, heads, rope], cos and sin [N, rope/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over (i, i + rope/2), as V3.2's indexer has it; x [..., N, heads, rope]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------- parts


def product_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are computed in here: autocast's type where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class _Fp8(torch.autograd.Function):
    """Through FP8 e4m3 with one power-of-two scale per vector, and back with the gradient unchanged."""

    @staticmethod
    def forward(ctx, x):
        values, scale = quantize_fp8(x)
        return (values.float() * scale.unsqueeze(-1)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Indexer(nn.Module):
    """The lightning indexer: I[t, s] = sum over heads of w[t, j] * relu(q[t, j] . k[s]); report, eq. 1."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.concentrate = 0.0
        """Weight of `concentration` in the loss; 0: it is measured alone."""
        self.figures: torch.Tensor | None = None
        """[3] float32, of the last loss: KL divergence, heads that count, share of what negative gates contribute."""
        self.wq_b = linear(size.q_lora_rank, size.index_heads * size.index_head_dim)
        self.wk = linear(size.hidden, size.index_head_dim)
        self.k_norm = nn.LayerNorm(size.index_head_dim, eps=1e-6)
        self.weights_proj = linear(size.hidden, size.index_heads)
        # Gates start out positive. Half of them stayed negative where they started at random: such a head argues
        # against tokens, and what it argues against comes back when a policy leaves the head out. Heads that argue
        # for tokens can be left out where they have nothing to say.
        with torch.no_grad():
            self.weights_proj.weight[:, 0] = GATE_START

    def keys(self, hidden: torch.Tensor, rope) -> torch.Tensor:
        """Index keys [..., D], dequantised FP8, of the attention's normed inputs `hidden` [..., hidden]."""
        dtype = product_dtype(hidden.device)  # asked for here: it is float32 where autocast is off
        with torch.autocast(hidden.device.type, enabled=False):
            k = self.k_norm(self.wk(hidden.float())).to(dtype)
        return _Fp8.apply(self._rotated(k.unsqueeze(-2), rope).squeeze(-2))

    def queries(self, hidden: torch.Tensor, latent: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries [..., H, D], dequantised FP8, and gates [..., H] float32.

        hidden [..., hidden] is the attention's normed input, latent [..., q_lora_rank] its normed query latent.
        """
        size, dtype = self.size, product_dtype(hidden.device)
        # not by autocast: what it casts without a gradient it would hand on to where one is wanted
        with torch.autocast(hidden.device.type, enabled=False):
            q = F.linear(latent.to(dtype), self.wq_b.weight.to(dtype))
            gates = self.weights_proj(hidden.float()) * (size.index_head_dim * size.index_heads) ** -0.5
        return _Fp8.apply(self._rotated(q.unflatten(-1, (size.index_heads, -1)), rope)), gates

    def _rotated(self, x: torch.Tensor, rope) -> torch.Tensor:
        turned, rest = x.split([self.size.rope_head_dim, x.shape[-1] - self.size.rope_head_dim], dim=-1)
        return torch.cat((rotate_halves(turned, *rope), rest), dim=-1)


class Past:
    """Keys and values of one layer for the tokens before those that are computed now."""

    def __init__(self, wanted: bool = False) -> None:
        self.wanted = wanted
        """Whether later tokens will want them."""
        self.parts: tuple[torch.Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self.parts[0].shape[2] if self.parts else 0

    def extended(self, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None):
        """k and v [B, heads, N, D] and index keys [B, N, D] of all tokens, these last."""
        if self.parts:
            k, v, keys = (
                torch.cat((old.to(new.dtype), new), dim=dim)
                for old, new, dim in zip(self.parts, (k, v, keys), (2, 2, 1), strict=True)
            )
        if self.wanted:
            self.parts = k, v, keys
        return k, v, keys


class Attention(nn.Module):
    """Multi-head latent attention, over all tokens or over those the indexer selects."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.q_a_proj = linear(size.hidden, size.q_lora_rank)
        self.q_a_layernorm = RMSNorm(size.q_lora_rank, size.eps)
        self.q_b_proj = linear(size.q_lora_rank, size.heads * size.head_dim)
        self.kv_a_proj_with_mqa = linear(size.hidden, size.kv_lora_rank + size.rope_head_dim)
        self.kv_a_layernorm = RMSNorm(size.kv_lora_rank, size.eps)
        self.kv_b_proj = linear(size.kv_lora_rank, size.heads * (size.nope_head_dim + size.v_head_dim))
        self.o_proj = linear(size.heads * size.v_head_dim, size.hidden)
        self.indexer = Indexer(size)

    def forward(self, x: torch.Tensor, rope, mode: str, kl_rows: torch.Tensor | None, full_kl: bool, past: Past):
        """Attention output [B, N, hidden], and the indexer's loss where `kl_rows` [B, R] names queries for it.

        past: keys and values of the tokens before x's, which x's attend to as well; its own are added to it.
        """
        size, before = self.size, past.length
        here = [table[before : before + x.shape[1]] for table in rope]
        latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(latent).unflatten(-1, (size.heads, size.head_dim))
        q_nope, q_rope = q.split([size.nope_head_dim, size.rope_head_dim], dim=-1)
        q = torch.cat((q_nope, rotate_pairs(q_rope, *here)), dim=-1).transpose(1, 2)

        compressed, k_rope = self.kv_a_proj_with_mqa(x).split([size.kv_lora_rank, size.rope_head_dim], dim=-1)
        up = self.kv_b_proj(self.kv_a_layernorm(compressed)).unflatten(-1, (size.heads, -1))
        k_nope, v = up.split([size.nope_head_dim, size.v_head_dim], dim=-1)
        k_rope = rotate_pairs(k_rope.unsqueeze(-2), *here).expand(-1, -1, size.heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        # one width for q, k and v is what lets scaled_dot_product_attention take its flash kernel
        v = F.pad(v, (0, size.head_dim - size.v_head_dim)).transpose(1, 2)

        selected = loss = keys = None
        # the indexer learns from its own loss alone (report, section 2.1.1), so its inputs are detached
        hidden, latent = x.detach(), latent.detach()
        sparse = mode == SPARSE and before + x.shape[1] > size.topk
        if sparse or kl_rows is not None or past.wanted:
            with torch.set_grad_enabled(kl_rows is not None and torch.is_grad_enabled()):
                keys = self.indexer.keys(hidden, here)
        k, v, keys = past.extended(k, v, keys)
        if sparse:
            selected = select(self.indexer, hidden, latent, keys.detach(), rope, before)
        if kl_rows is not None:
            chosen = None if full_kl else selected
            loss = indexer_loss(
                self.indexer, hidden, latent, keys, rope, q.detach(), k.detach(), kl_rows, chosen, before
            )
        if selected is None:
            attended = kernels.dense_attention(q, k, v)
        else:
            attended = sparse_attention(q, k, v, selected, before)
        attended = attended[..., : size.v_head_dim].transpose(1, 2).flatten(-2)
        return self.o_proj(attended), loss


class MLP(nn.Module):
    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.gate_proj = linear(size.hidden, size.intermediate)
        self.up_proj = linear(size.hidden, size.intermediate)
        self.down_proj = linear(size.intermediate, size.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden, size.eps)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden, size.eps)
        self.mlp = MLP(size)

    def forward(self, x, rope, mode, kl_rows, full_kl, past):
        attended, loss = self.self_attn(self.input_layernorm(x), rope, mode, kl_rows, full_kl, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class DsaModel(nn.Module):
    """The language model; its parameters have the names of the checkpoint."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        size.check()
        self.size = size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(size.vocab, size.hidden),
            "layers": nn.ModuleList(Layer(size) for _ in range(size.layers)),
            "norm": RMSNorm(size.hidden, size.eps),
        })  # fmt: skip
        # the embedding is the output matrix too: this makes the first logits small
        nn.init.normal_(self.model["embed_tokens"].weight, std=EMBEDDING_STD * size.hidden**-0.5)
        for layer in self.model["layers"]:
            # a layer adds nothing at first, so depth does not slow the start
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Let some heads of the first layer start out attending to the token 1, 2, ... places before.

        Copying needs a head that finds where the current token stood before by what the following token knows of its
        predecessors. Small models take thousands of steps to find the first half of that by chance; here it is given,
        and the second half is learnt in hundreds. The embedding gets a common component (it moves all logits alike),
        which those heads' RoPE parts read: q turned back by the distance meets k at just that distance.
        """
        size, attention = self.size, self.model["layers"][0].self_attn
        common = COMMON_COMPONENT * EMBEDDING_STD * size.hidden**-0.5
        self.model["embed_tokens"].weight[:, 0] = common
        attention.q_a_proj.weight[0].zero_()
        attention.q_a_proj.weight[0, 0] = 1.0
        rope = attention.kv_a_proj_with_mqa.weight[size.kv_lora_rank :].unflatten(0, (-1, 2))  # [pairs, 2, hidden]
        rope.zero_()
        rope[:, 0, 0] = 1.0
        per_head = attention.q_b_proj.weight.unflatten(0, (size.heads, size.head_dim))
        pairs = torch.arange(0, size.rope_head_dim, 2)
        frequency = size.rope_theta ** -(pairs / size.rope_head_dim)
        # fast pairs tell neighbours apart, slower ones keep far places that happen to agree with the fast ones away
        useful = frequency.sqrt() * (frequency > 0.003)
        # what the norms make of the common component, in q's latent and in k
        in_x = COMMON_COMPONENT / math.sqrt(1 + COMMON_COMPONENT**2 / size.hidden)
        in_latent = in_x / math.sqrt(1 + in_x**2 / size.q_lora_rank)
        gain = NEIGHBOUR_LOGIT * math.sqrt(size.head_dim) / (in_x * in_latent)
        for head in range(size.heads // 3 + (size.heads > 2)):
            angle = -frequency * (head + 1)
            turned = torch.stack((angle.cos(), angle.sin()), dim=-1) * (gain * useful).unsqueeze(-1)
            per_head[head].zero_()
            per_head[head, size.nope_head_dim :, 0] = turned.flatten()
            columns = slice(head * size.v_head_dim, (head + 1) * size.v_head_dim)
            # what such a head adds is then of an embedding's size
            spread = EMBEDDING_STD * (size.hidden * size.v_head_dim) ** -0.5
            nn.init.normal_(attention.o_proj.weight[:, columns], std=spread)

    def start_indexers(self) -> None:
        """Give every layer an indexer that has learnt nothing."""
        for layer in self.model["layers"]:
            device = layer.self_attn.o_proj.weight.device
            layer.self_attn.indexer = Indexer(self.size).to(device)

    def forward(
        self,
        tokens: torch.Tensor,
        mode: str = DENSE,
        kl_rows: torch.Tensor | None = None,
        full_kl: bool = False,
        context: int = 0,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [B, N - context, hidden] of tokens [B, N] int64, and the indexers' loss over layers.

        mode: `DENSE` attends to every earlier token, `SPARSE` to the `topk` the indexer selects.
        kl_rows [B, R] int64: queries, counted from `context`, at which the indexer learns the attention distribution;
        None: nowhere.
        full_kl: in sparse mode too, learn it over all earlier tokens instead of the selected ones.
        context: so many first tokens are only attended to. They are computed densely and without gradient, at a
        fraction of the cost, so that training can afford long sequences; `SPARSE` only.
        positions [N]: ascending, of the tokens; 0, 1, ... unless given.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_tables(self.size, positions)
        pasts = [Past(wanted=context > 0) for _ in self.model["layers"]]
        if context:
            # uncached: what autocast casts without a gradient it would hand on to the tokens that are trained on
            device = tokens.device.type
            cast = torch.autocast(
                device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
            )
            with torch.no_grad(), cast:
                self._layers(tokens[:, :context], rope, DENSE, None, False, pasts)
        x, losses = self._layers(tokens[:, context:], rope, mode, kl_rows, full_kl, pasts)
        return self.model["norm"](x), torch.stack(losses).mean() if losses else x.new_zeros(())

    def _layers(self, tokens, rope, mode, kl_rows, full_kl, pasts):
        x, losses = self.model["embed_tokens"](tokens), []
        for layer, past in zip(self.model["layers"], pasts, strict=True):
            x, loss = layer(x, rope, mode, kl_rows, full_kl, past)
            past.wanted = False
            if loss is not None:
                losses.append(loss)
        return x, losses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.model["embed_tokens"].weight).float()

    def token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy [T] float32, and whether the likeliest token is right [T] bool, in chunks of tokens."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten()

        def chunk_losses(hidden, targets):
            logits = self.logits(hidden)
            return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

        parts = [
            remade(chunk_losses, *part)
            for part in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        ]
        losses, right = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(right)


# ---------------------------------------------------------------- sparse attention


def query_chunks(length: int, pairs: int, keys: int) -> list[tuple[int, int]]:
    """Ranges of `length` queries, a power of two each, that make about `pairs` (query, key) pairs at `keys` keys."""
    chunk = max(16, 1 << int(math.log2(max(1, pairs // keys))))
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


@torch.no_grad()
def select(
    indexer: Indexer, hidden: torch.Tensor, latent: torch.Tensor, keys: torch.Tensor, rope, before: int = 0
) -> torch.Tensor:
    """Exact DSA selection, [B, N, topk] int32; entries of a row with fewer visible tokens repeat its first token.

    hidden and latent are of N tokens that `before` others precede, keys [B, before + N, D] of all.
    Queries are made chunk by chunk: all at once they would be the largest tensor of the model.
    """
    (batch, length, _), size = hidden.shape, indexer.size
    selected = torch.zeros(batch, length, size.topk, dtype=torch.int32, device=hidden.device)
    pairs = kernels.scored_at_once(size.index_heads, hidden.device)
    for row in range(batch):
        for start, stop in query_chunks(length, min(pairs, QUERIES_AT_ONCE * keys.shape[1]), keys.shape[1]):
            some, end = slice(start, stop), before + stop
            q, gates = indexer.queries(
                hidden[row, some], latent[row, some], [table[before + start : end] for table in rope]
            )
            found = kernels.index_scores(q, keys[row, :end], gates, before + start)
            best = found.topk(min(size.topk, end), dim=-1, sorted=False).indices
            # rows with fewer visible tokens than topk select them all, the first one among them
            visible = torch.arange(before + start, end, device=hidden.device).unsqueeze(-1)
            selected[row, some, : best.shape[-1]] = best.masked_fill_(best > visible, 0)
    return selected


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: torch.Tensor, before: int = 0
) -> torch.Tensor:
    """Attention [B, heads, N, D] of q [B, heads, N, D] over each query's `selected` [B, N, topk] tokens.

    k and v [B, heads, before + N, D].

    A mask over all keys, made anew in the backward pass: for these sizes that is cheaper than gathering keys, whose
    gradients would have to be scattered.
    """
    length = k.shape[2]

    def chunk_attention(q, k, v, selected):
        mask = q.new_full((q.shape[0], 1, q.shape[2], k.shape[2]), -torch.inf)
        mask.squeeze(1).scatter_(-1, selected.long(), 0.0)
        return kernels.masked_attention(q, k, v, mask)

    parts = []
    for start, stop in query_chunks(q.shape[2], MASKED_PAIRS // q.shape[0], length):
        # keys in whole sixteens, the alignment that the memory-efficient kernel wants of a mask's rows
        keys = min(length, -(-(before + stop) // 16) * 16)
        part = q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys], selected[:, start:stop]
        parts.append(remade(chunk_attention, *part))
    return torch.cat(parts, dim=2)


# ---------------------------------------------------------------- the indexer's loss


def indexer_loss(
    indexer: Indexer, hidden, latent, keys, rope, q, k, rows: torch.Tensor, selected: torch.Tensor | None, before: int
) -> torch.Tensor:
    """KL divergence from the indexer's softmax to the attention distribution, a mean over the queries `rows` [B, R].

    The target is attention summed over heads and L1-normalised, over all earlier tokens (report, eq. 3) or, with
    `selected` [B, N, topk], over the selected ones (eq. 4). The attention's q and k [B, heads, N, D] carry no gradient,
    and only the indexer's parameters get one. Queries are counted from `before`, the position of the first of q's.

    `indexer.concentrate` adds that times log(heads that count) and the share of what negative gates contribute;
    `indexer.figures` tells both of them, and the divergence, whatever the weight.
    """
    chunk, losses, counted = max(1, KL_PAIRS // k.shape[2]), [], []

    def one_chunk(keys, hidden, latent, row_q, k, some, chosen):
        index_q, gates = indexer.queries(hidden, latent, [table[before + some] for table in rope])
        with torch.no_grad():
            attention = kernels.attention_logits(row_q, k)
        if chosen is None:
            left_out = torch.arange(k.shape[1], device=k.device) > before + some.unsqueeze(-1)  # [R, N]
            score = kernels.differentiable_scores(index_q, keys, gates)
        else:
            repeats = chosen == 0  # token 0 fills up short rows: it counts once
            left_out = repeats & (repeats.cumsum(-1) > 1)
            attention = attention.gather(-1, chosen.expand(attention.shape[0], -1, -1))
            score = kernels.differentiable_scores(index_q, keys[chosen], gates)
        with torch.no_grad():
            target = attention.masked_fill_(left_out, -torch.inf).softmax(-1).mean(0)
            tokens = telling_tokens(target, before + some + 1, chosen)
        loss = divergence(target, score.masked_fill(left_out, -torch.inf), left_out)
        # last, for the backward pass computes again only as far as it needs
        with torch.set_grad_enabled(indexer.concentrate > 0 and torch.is_grad_enabled()):
            # the keys are the same for all heads, so they are left out of it
            heads = concentration(index_q, gates, keys.detach()[tokens])
        return loss, *heads

    for b in range(rows.shape[0]):
        for some in rows[b].split(chunk):
            chosen = None if selected is None else selected[b, some].long()
            part = keys[b], hidden[b, some], latent[b, some], q[b, :, some], k[b], some, chosen
            loss, *heads = remade(one_chunk, *part)
            losses.append(loss)
            counted.append(torch.stack(heads))
    loss, counted = torch.cat(losses).mean(), torch.cat(counted, dim=1)  # [2, B * R]
    indexer.figures = torch.stack([loss, *counted.mean(1)]).detach()
    if not indexer.concentrate:
        return loss
    return loss + indexer.concentrate * (counted[0].log() + counted[1]).mean()


def telling_tokens(target: torch.Tensor, visible: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """[R, COUNTED_KEYS] int64: half where the attention `target` [R, N] goes, half spread over `visible` [R] tokens.

    Evenly spaced quantiles of both: no chance is in it, so the backward pass finds the same tokens again.
    chosen [R, N]: the tokens that target's entries stand for, unless they are 0, 1, ...
    """
    half = COUNTED_KEYS // 2
    places = (torch.arange(half, device=target.device) + 0.5) / half
    mass = target.cumsum(-1)
    attended = torch.searchsorted(mass, places * mass[:, -1:]).clamp_(max=target.shape[1] - 1)
    if chosen is not None:
        attended = chosen.gather(-1, attended)
    spread = (places * visible.unsqueeze(-1)).long()
    return torch.minimum(torch.cat((attended, spread), dim=-1), visible.unsqueeze(-1) - 1)


def concentration(q: torch.Tensor, gates: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many heads count for a query, [R] in 1 to H, and what share of it has a negative gate, [R] in 0 to 1.

    q [R, H, D], gates [R, H], keys [R, S, D] of tokens that are worth telling apart.

    A head contributes c = |w| times the standard deviation of relu(q . k) over those tokens; (sum c)^2 / sum c^2 heads
    count. The deviation, not the mean, for a selection depends on differences alone: what a head gives to all tokens
    alike changes nothing in it, and were the mean to count, one head with a constant would look like all of the work
    at no cost to the divergence.
    """
    products = torch.einsum("mhd,msd->mhs", q, keys).relu().float()
    # the small numbers keep gradients finite where a query sees one token, or no head has a product above zero
    parts = gates.float().abs() * (products.var(-1, correction=0) + 1e-6).sqrt()
    shares = parts / (parts.sum(-1, keepdim=True) + 1e-9)
    return 1 / (shares.square().sum(-1) + 1e-6), (shares * (gates < 0)).sum(-1)


def divergence(target: torch.Tensor, score: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """KL(target || softmax(score)) [R] over the entries that are not `hidden`; both [R, N]."""
    log_share = score.log_softmax(-1).masked_fill(hidden, 0.0)
    return (torch.special.xlogy(target, target) - target * log_share).sum(-1)
