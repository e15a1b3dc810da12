"""Cross-entropy of a 32k vocabulary: chunks against full logits against Liger's fused kernel.

    python benchmarks/gpu/loss.py          # one GPU, a minute
    python benchmarks/gpu/loss.py --toy    # correctness only, writes nothing

Forward and backward from the last hidden states (bfloat16) and the head (float32, as in training)
to the gradients of both. Parity first: loss and gradients of every side against full logits in
float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import measuring
from measuring import Options

RESULTS = "gpu_loss.jsonl"
CHUNKS = (512, 2048, 8192)
Side = Callable[[Any, Any, Any], Any]
"""Hidden states, weight of the head, target ids -> mean loss."""


def ours(hidden: Any, weight: Any, targets: Any, *, chunk: int) -> Any:
    from mediphi.modules.losses import chunked_cross_entropy

    total = chunked_cross_entropy(hidden, weight, targets, chunk_tokens=chunk).total
    return total / len(targets)


def full_logits(hidden: Any, weight: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger(hidden: Any, weight: Any, targets: Any, *, loss: Any) -> Any:
    """Its kernel knows no autocast."""
    return loss(weight.to(hidden.dtype), hidden, targets)


def all_sides(*, tokens: int) -> dict[str, Side]:
    found: dict[str, Side] = {
        f"ours, {chunk} positions": partial(ours, chunk=chunk) for chunk in CHUNKS if chunk < tokens
    }
    found["torch, full logits"] = full_logits
    if measuring.device() == "cuda" and measuring.installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        found["liger, fused linear"] = partial(liger, loss=LigerFusedLinearCrossEntropyLoss())
    return found


def problem(options: Options, *, tokens: int) -> tuple[Any, Any, Any]:
    """Hidden states as a norm leaves them, a head as it is drawn, random targets."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.folder)
    size, on = config.hidden_size, measuring.device()
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, device=on, dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(config.vocab_size, size, device=on)).requires_grad_()
    return hidden, weight, torch.randint(0, config.vocab_size, (tokens,), device=on)


def step(side: Side, problem: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Loss and both gradients."""
    import torch

    hidden, weight, targets = problem
    hidden.grad = weight.grad = None
    with torch.autocast(measuring.device(), torch.bfloat16):
        loss = side(hidden, weight, targets)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def check_parity(found: dict[str, Side], options: Options) -> dict[str, Any]:
    """How far loss and gradients are off full logits in float32, of the gradients' norm.

    Raises:
        AssertionError: by more than bfloat16 explains.
    """
    import torch

    hidden, weight, targets = problem(options, tokens=512)
    exact = hidden.detach().float().requires_grad_()
    with torch.autocast(measuring.device(), enabled=False):
        full_logits(exact, weight, targets).backward()
    wanted = (exact.grad, weight.grad)
    loss = full_logits(exact, weight, targets).detach()
    report = {}
    for name, side in found.items():
        got, *grads = step(side, (hidden, weight, targets))
        offs = [
            float((g.float() - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)
        ]
        report[name] = {
            "loss_off": float(f"{abs(float(got - loss)):.1e}"),
            "grad_off": float(f"{max(offs):.1e}"),
        }
        assert report[name]["loss_off"] < 2e-3 and max(offs) < 2e-2, f"{name}: {report[name]}"
    return report


def figures(options: Options) -> Iterator[dict[str, Any]]:
    tokens = 700 if options.toy else 16_384
    found = all_sides(tokens=tokens)
    parity = check_parity(found, options)
    own = problem(options, tokens=tokens)
    calls = {name: partial(step, side, own) for name, side in found.items()}
    costs = measuring.in_turns(calls, toy=options.toy, deadline=options.deadline)
    size, vocab = own[1].shape[1], own[1].shape[0]
    floor = 3 * 2 * tokens * size * vocab / measuring.peak_flops()
    base = costs[next(iter(costs))] if options.toy else costs["ours, 2048 positions"]
    line = {
        "figure": "cross-entropy of the head, forward and backward, bf16",
        "data": f"{tokens} targets, {size} x {vocab}",
    }
    for name, measured in costs.items():
        if not measured:
            yield {**line, "side": name, "failure": options.deadline.told}
            continue
        yield {
            **line,
            "side": name,
            **measuring.seconds_ratio(base, measured),
            "ms": measuring.median_ms(measured),
            "peak_mib": round(measured[-1].mib),
            "share_of_peak": round(floor / (measuring.median_ms(measured) / 1e3), 3),
            "parity": parity[name],
        }


if __name__ == "__main__":
    measuring.run_benchmark(figures, doc=__doc__, results=RESULTS)
