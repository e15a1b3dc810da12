"""Attention over packed rows: PyTorch's varlen kernel, SDPA in blocks, flash-attn, a dense mask.

    python benchmarks/gpu/attention.py          # one GPU, two minutes
    python benchmarks/gpu/attention.py --toy    # correctness only, writes nothing

Forward and backward of one layer's attention in bfloat16, as the model calls it: one row of long
documents, one of short ones, and pairs of answers that share their prompts (against the same pairs
with each prompt twice). `masked` is what PyTorch's SDPA does with a block-diagonal mask over the
row, as transformers makes it for packed rows. Parity first: outputs and gradients of every side
against documents going one by one through SDPA in float32. The share of the peak counts only
(query, key) pairs of causal attention within documents.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import measuring
import sides
import torch
import torch.nn.functional as F
from measuring import Options

from mediphi import attention
from mediphi.batches import PreferenceBatch, TokenBatch

RESULTS = "gpu_attention.jsonl"
FIGURE = "attention of one layer, forward and backward, bf16"
Call = Callable[[Any, Any, Any], Any]
"""Query, key and value `[1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`."""


class Row(NamedTuple):
    """A packed row: its segments; `parts` 3 where they are prompt, chosen and rejected in turn."""

    name: str
    lengths: list[int]
    parts: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def sequences(self) -> list[list[tuple[int, int]]]:
        """What sees itself causally: runs of the row, end to end."""
        runs = list(pairwise(accumulate(self.lengths, initial=0)))
        if self.parts == 1:
            return [[run] for run in runs]
        threes = zip(runs[0::3], runs[1::3], runs[2::3], strict=True)
        return [[p, answer] for p, *answers in threes for answer in answers]

    def pairs(self) -> int:
        """(query, key) pairs that have to be looked at; those of a shared prompt once."""
        triangles = sum(n * (n + 1) // 2 for n in self.lengths)
        threes = zip(self.lengths[0::3], self.lengths[1::3], self.lengths[2::3], strict=False)
        return triangles + (self.parts == 3) * sum(p * (c + r) for p, c, r in threes)


def rows(options: Options) -> list[Row]:
    tokens = 200 if options.toy else 16_384
    longest = tokens // 4
    short = measuring.random_lengths(tokens, median=tokens // 50, longest=longest)
    shared = [n for one in short for n in (one, max(1, one // 2), max(1, one // 3))]
    return [
        Row("documents of equal length", [longest] * 4),
        Row("short documents", fitting(short, tokens)),
        Row("shared prompts", fitting(shared, tokens, parts=3), parts=3),
    ]


def fitting(lengths: list[int], tokens: int, *, parts: int = 1) -> list[int]:
    """As many of the first ones, `parts` at a time, as a row holds."""
    kept: list[int] = []
    for start in range(0, len(lengths), parts):
        own = lengths[start : start + parts]
        if sum(kept) + sum(own) > tokens:
            break
        kept += own
    return kept


# ---------------------------------------------------------------------------------- sides
def batch_of(row: Row) -> Any:
    """Only what `attention.boundaries` looks at is real."""
    none, ids = torch.zeros(0, dtype=torch.int64), torch.zeros(1, row.tokens, dtype=torch.int64)
    groups = torch.zeros(1, row.tokens, dtype=torch.uint8)
    common: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": ids,
        "cu_seqlens": torch.tensor([0, *row.lengths]).cumsum(0).int(),
        "lengths": tuple(row.lengths),
        "max_seqlen": max(sum(b - a for a, b in runs) for runs in row.sequences()),
        "num_global_targets": 1,
        "document_index": none,
    }
    columns = {"kind_ids": groups, "source_ids": groups, "task_ids": groups}
    if row.parts == 1:
        return TokenBatch(target_ids=ids, target_index=none, **columns, **common)
    no_group = none.to(torch.uint8)
    return PreferenceBatch(
        shares_prompt=True,
        logit_index=none,
        label_ids=none,
        answer_ids=none,
        reference_logps=torch.zeros(0, 2),
        **dict.fromkeys(("source_ids", "task_ids", "error_ids"), no_group),
        **common,
    )


def kernel_side(row: Row, kernel: attention.Kernel) -> Call:
    """Boundaries are made once for all layers, so they are not timed."""
    options = attention.boundaries(batch_of(row).to(measuring.device()), kernel)
    module = torch.nn.Identity()
    if kernel == "flash":
        return partial(flash, options=options)
    call = attention.varlen_attention if kernel == "varlen" else attention.sdpa_attention
    return lambda q, k, v: call(module, q, k, v, None, **options)[0]


def flash(q: Any, k: Any, v: Any, *, options: dict[str, Any]) -> Any:
    from flash_attn import flash_attn_varlen_func

    places = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    options = options["sealed"].arguments
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, *(options[p] for p in places), causal=True)[None]


def masked_side(row: Row) -> Call:
    mask = torch.zeros(row.tokens, row.tokens, dtype=torch.bool)
    for runs in row.sequences():
        places = torch.cat([torch.arange(a, b) for a, b in runs])
        mask[places[:, None], places] |= places[:, None] >= places
    mask = mask.to(measuring.device())
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def twice_side(row: Row) -> Call:
    """Every prompt in front of both its answers, as rows without sharing have it."""
    places = torch.cat([torch.arange(a, b) for runs in row.sequences() for a, b in runs])
    places = places.to(measuring.device())
    lengths = [sum(b - a for a, b in runs) for runs in row.sequences()]
    call = kernel_side(Row("", lengths), attention.choose_kernel("auto", device_type=kind()))
    return lambda q, k, v: call(*(x.index_select(2, places) for x in (q, k, v)))


def kind() -> str:
    return measuring.device()


def all_sides(row: Row) -> dict[str, Call]:
    kernels = attention.available_kernels(kind())
    if row.parts == 3:
        kernels = [kernel for kernel in kernels if kernel != "flash"]
    found = {kernel: kernel_side(row, kernel) for kernel in kernels}
    return {**found, "masked": masked_side(row)}


# ---------------------------------------------------------------------------------- runs
def heads(options: Options, row: Row) -> list[Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.folder)
    number = config.num_attention_heads
    shape = (1, number, row.tokens, config.hidden_size // number)
    torch.manual_seed(0)
    drawn = (torch.randn(shape, device=kind(), dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_() for x in drawn]


def step(call: Call, qkv: list[Any], upstream: Any) -> list[Any]:
    """Output and gradients."""
    out = call(*qkv)
    grads = torch.autograd.grad(out, qkv, upstream[:, : out.shape[1]])
    return [out.detach(), *grads]


def one_by_one(row: Row, qkv: list[Any], upstream: Any) -> list[Any]:
    """In float32; a prompt's output is that of its first sequence, which both share."""
    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = torch.zeros_like(upstream, dtype=torch.float32)
    for runs in row.sequences():
        places = torch.cat([torch.arange(a, b) for a, b in runs]).to(kind())
        own = (x.index_select(2, places) for x in exact)
        alone = F.scaled_dot_product_attention(*own, is_causal=True).transpose(1, 2)
        out = out.index_copy(1, places, alone)
    grads = torch.autograd.grad(out, exact, upstream.float())
    return [out.detach(), *grads]


def check_parity(row: Row, calls: dict[str, Call], qkv: list[Any], upstream: Any) -> dict[str, Any]:
    """The largest share of its norm that an output or gradient is off; what has no room goes.

    Raises:
        AssertionError: by more than bfloat16 explains.
    """
    wanted = one_by_one(row, qkv, upstream)
    report = {}
    for name, call in list(calls.items()):
        try:
            got = step(call, qkv, upstream)
        except torch.OutOfMemoryError:
            print(f"{name} on {row.name}: out of memory", file=sys.stderr)
            del calls[name]
            continue
        off = max(
            float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)
        )
        assert off < 2e-2, f"{name} on {row.name}: off by {off}"
        report[name] = float(f"{off:.1e}")
    return report


def figures(options: Options) -> Iterator[dict[str, Any]]:
    peak = measuring.peak_flops()
    for row in rows(options):
        calls = all_sides(row)
        line = {"figure": FIGURE, "data": row.name}
        if not options.deadline.leaves():
            yield from ({**line, "side": name, "failure": options.deadline.told} for name in calls)
            continue
        qkv = heads(options, row)
        upstream = torch.randn_like(qkv[0]).transpose(1, 2)
        parity = check_parity(row, calls, qkv, upstream)
        timed = {name: partial(step, call, qkv, upstream) for name, call in calls.items()}
        if row.parts == 3:
            both = sum(b - a for runs in row.sequences() for a, b in runs)
            longer = torch.randn(1, both, *upstream.shape[2:], device=kind(), dtype=upstream.dtype)
            timed["prompts twice"] = partial(step, twice_side(row), qkv, longer)
        costs = measuring.in_turns(timed, toy=options.toy, deadline=options.deadline)
        # Two products forward, four backward; what kernels recompute is no use to anybody.
        flops = 12 * row.pairs() * qkv[0].shape[1] * qkv[0].shape[3]
        base = costs[attention.choose_kernel("auto", device_type=kind(), shares_prompts=True)]
        for name, measured in costs.items():
            if not measured:
                yield {**line, "side": name, "failure": options.deadline.told}
                continue
            seconds = sides.median(one.seconds for one in measured)
            yield {
                **line,
                "side": name,
                **measuring.seconds_ratio(base, measured),
                "ms": measuring.median_ms(measured),
                "peak_mib": round(measured[-1].mib),
                "share_of_peak": round(flops / seconds / peak, 3),
                "parity": parity.get(name),
                "tokens": row.tokens,
                "segments": len(row.lengths),
            }


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)
