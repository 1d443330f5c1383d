"""Published methods once more, image by image, in plain torch on timm's modules: what ours owe.

Nothing of sait is used. Matrices are whole, choices are loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (x (n, C) behind the attention, its matrix (H, n, n), keys and values (H, n, D), sizes (n,)) -> (x, sizes) that stay
Reduce = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward(vit: Any, images: Tensor, at: dict[int, Reduce]) -> tuple[Tensor, list[list[int]]]:
    """(logits (B, classes), [image][block] -> tokens that leave it) with a method at some blocks."""
    logits, counts = [], []
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        sizes, left = torch.ones(len(x), dtype=x.dtype), []
        for number, block in enumerate(vit.blocks):
            attn, n = block.attn, len(x)
            q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            q, k = attn.q_norm(q), attn.k_norm(k)
            matrix = (q @ k.mT * attn.head_dim**-0.5 + sizes.log()).softmax(-1)
            attended = attn.norm((matrix @ v).transpose(0, 1).reshape(n, -1))
            x = x + block.ls1(attn.proj(attended))
            if number in at:
                x, sizes = at[number](x, matrix, k, v, sizes)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            left.append(len(x))
        logits.append(vit.forward_head(vit.norm(x[None]))[0])
        counts.append(left)
    return torch.stack(logits), counts


def ltp_soft(vit: Any, thresholds: list[Tensor], temperature: float, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(logits, [block] -> (B, patches) soft masks): what each block gives of a patch is multiplied by its mask."""
    logits, masks = [], []
    prefix = vit.num_prefix_tokens
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        for block, threshold in zip(vit.blocks, thresholds, strict=True):
            attn, n = block.attn, len(x)
            q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
            matrix = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.head_dim**-0.5).softmax(-1)
            soft = 1 / (1 + torch.exp(-(matrix.mean((0, 1))[prefix:] - threshold) / temperature))
            x = x + block.ls1(attn.proj(attn.norm((matrix @ v).transpose(0, 1).reshape(n, -1))))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            x = torch.cat([x[:prefix], x[prefix:] * soft[:, None]])
            masks.append(soft)
        logits.append(vit.forward_head(vit.norm(x[None]))[0])
    depth = len(thresholds)
    return torch.stack(logits), [torch.stack(masks[block::depth]) for block in range(depth)]


def dynamicvit(
    vit: Any, learned: dict[int, dict[str, Tensor]], images: Tensor, keep: float
) -> tuple[Tensor, list[list[int]]]:
    """(logits, [image][stage] -> tokens that stay): predictors of these weights, by block, choose ahead of it."""
    logits, counts = [], []
    prefix = vit.num_prefix_tokens
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        first, left = len(x) - prefix, []
        for number, block in enumerate(vit.blocks):
            if number in learned:
                chances = predicted(learned[number], x[prefix:])[:, 0].tolist()
                count = int(first * keep ** (len(left) + 1))
                best = sorted(range(len(chances)), key=chances.__getitem__)[len(chances) - count :]
                x = x[[*range(prefix), *(prefix + j for j in sorted(best))]]
                left.append(len(x))
            x = block(x[None])[0]
        logits.append(vit.forward_head(vit.norm(x[None]))[0])
        counts.append(left)
    return torch.stack(logits), counts


def cagevit(
    vit: Any, learned: dict[str, dict[str, Tensor]], images: Tensor, keep: int, top: int
) -> tuple[Tensor, list[list[int]], Tensor]:
    """(logits, [image] -> patches that stay, (B, classes) answers of the CNN): Grad-CAM by gradients, as defined."""
    logits, stays, answers = [], [], []
    cnn, (queries,) = learned["scorer0"], learned["after0"].values()
    prefix = vit.num_prefix_tokens
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        rows, columns = (side // patch for side, patch in zip(image.shape[1:], vit.patch_embed.patch_size, strict=True))
        with torch.enable_grad():
            normed = normalised(x[prefix:].detach()) * cnn["norm.weight"] + cnn["norm.bias"]
            maps = normed.T.reshape(1, -1, rows, columns)
            for layer in ("first", "second"):
                maps = torch.conv2d(maps, cnn[f"{layer}.weight"], cnn[f"{layer}.bias"], padding=1).clamp_min(0)
            answer = cnn["answer.weight"] @ maps[0].mean((1, 2)) + cnn["answer.bias"]
            chances = answer.softmax(0).tolist()
            best = sorted(range(len(chances)), key=chances.__getitem__)[-top:]
            scores = torch.zeros(rows, columns)
            for c in best:
                (slopes,) = torch.autograd.grad(answer[c], maps, retain_graph=True)
                importance = slopes.mean((2, 3), keepdim=True)
                scores = scores + chances[c] * (importance * maps).sum(1)[0].clamp_min(0).detach()
        order = sorted(range(rows * columns), key=lambda j: (-float(scores.flatten()[j]), j))
        major, minor = sorted(order[:keep]), sorted(order[keep:])
        gone = x[[prefix + j for j in minor]]
        fused = [(normalised(gone) @ query).softmax(0) @ gone for query in queries]
        x = torch.cat([x[[*range(prefix), *(prefix + j for j in major)]], torch.stack(fused)])
        logits.append(vit.forward_head(vit.norm(vit.blocks(x[None])))[0])
        stays.append(major)
        answers.append(answer)
    return torch.stack(logits), stays, torch.stack(answers)


def normalised(x: Tensor) -> Tensor:
    """LayerNorm of each row, without its weights."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


def adavit(vit: Any, learned: dict[int, dict[str, Tensor]], images: Tensor) -> tuple[Tensor, list[list[Any]]]:
    """(logits, [image][block that has gates] -> (rows, heads, sub-layers) that are on), by gates of these weights."""
    logits, every = [], []
    for image in images:
        x, found = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0], []
        for number, block in enumerate(vit.blocks):
            if number not in learned:
                x = block(x[None])[0]
                continue
            rows, heads, layers = on = gates_on(learned[number], x, vit.num_prefix_tokens)
            found.append(on)
            rows_of_x = dict(enumerate(x))
            if 0 in layers:
                some, attn = torch.stack([rows_of_x[i] for i in rows]), block.attn
                q, k, v = attn.qkv(block.norm1(some)).view(len(rows), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
                q, k = attn.q_norm(q), attn.k_norm(k)
                attended = torch.zeros_like(v)
                for h in heads:
                    attended[h] = (q[h] @ k[h].T * attn.head_dim**-0.5).softmax(-1) @ v[h]
                y = attn.proj(attn.norm(attended.transpose(0, 1).reshape(len(rows), -1)))
                rows_of_x |= dict(zip(rows, some + block.ls1(y), strict=True))
            if 1 in layers:
                some = torch.stack([rows_of_x[i] for i in rows])
                rows_of_x |= dict(zip(rows, some + block.ls2(block.mlp(block.norm2(some))), strict=True))
            x = torch.stack([rows_of_x[i] for i in range(len(x))])
        logits.append(vit.forward_head(vit.norm(x[None]))[0])
        every.append(found)
    return torch.stack(logits), every


def gates_on(weights: dict[str, Tensor], x: Tensor, prefix: int) -> tuple[list[int], list[int], list[int]]:
    """Which rows, heads and sub-layers of an image are on: a probability of one half and more."""

    def on(name: str, rows: Tensor) -> list[int]:
        chances = torch.sigmoid(rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).flatten()
        return [i for i, chance in enumerate(chances) if chance >= 0.5]

    rows = sorted({*range(prefix), *on("tokens", x)})
    return rows, on("heads", x[0]), on("layers", x[0])


def predicted(weights: dict[str, Tensor], patches: Tensor) -> Tensor:
    """(n, 2), the logarithms of the probabilities that each of an image's patches stays and goes."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    hidden = gelu(linear("hidden", normalised(patches) * weights["norm.weight"] + weights["norm.bias"]))
    half = hidden.shape[1] // 2
    shared = hidden[:, half:].sum(0) / len(hidden)
    both = torch.cat([hidden[:, :half], shared.repeat(len(hidden), 1)], 1)
    return torch.log_softmax(linear("out", gelu(linear("second", gelu(linear("first", both))))), 1)


def hot(
    vit: Any, learned: dict[str, Tensor], heads: int, images: Tensor, at: int, count: int, neighbours: int
) -> tuple[Tensor, list[list[int]]]:
    """(rows (B, N, C) of full length behind the final norm, [image] -> the patches that stay): density peaks ahead of
    block ``at``, queries of these weights behind the last one."""
    results, stayed = [], []
    prefix = vit.num_prefix_tokens
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        for number, block in enumerate(vit.blocks):
            if number == at:
                scores = density_peaks(x[prefix:].detach(), neighbours)
                best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]
                stayed.append(sorted(best))
                x = x[[*range(prefix), *(prefix + j for j in sorted(best))]]
            x = block(x[None])[0]
        results.append(vit.norm(torch.cat([x[:prefix], recovered(learned, heads, x)])))
    return torch.stack(results), stayed


def density_peaks(patches: Tensor, neighbours: int) -> list[float]:
    """rho * delta of each patch (n, C), in float64."""
    x, n = patches.double(), len(patches)
    apart = [[float((x[i] - x[j]).square().sum().sqrt()) / x.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    rho = []
    for i in range(n):
        near = sorted(apart[i][j] for j in range(n) if j != i)[:neighbours]
        rho.append(math.exp(-sum(d * d for d in near) / max(len(near), 1)))
    scores = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        scores.append(rho[i] * (min(denser) if denser else max(apart[i])))
    return scores


def recovered(learned: dict[str, Tensor], heads: int, x: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(n, C) rows that are left, with the patches that each stands for -> (patches, C): query by query, head by
    head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ learned[f"{name}.weight"].T + learned[f"{name}.bias"]

    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    normed = normed * learned["norm.weight"] + learned["norm.bias"]
    queries, D = learned["queries"], x.shape[1] // heads
    q, k, v = linear("query", queries), linear("key", normed), linear("value", normed)
    counts = torch.ones(len(x), dtype=x.dtype) if sizes is None else sizes
    rows = []
    for i in range(len(queries)):
        of_heads = []
        for part in (slice(h * D, (h + 1) * D) for h in range(heads)):
            logits = (k[:, part] @ q[i, part]) / D**0.5
            weights = counts * (logits - logits.max()).exp()
            of_heads.append(weights @ v[:, part] / weights.sum())
        rows.append(torch.cat(of_heads))
    return queries + linear("proj", torch.stack(rows))


def evit(prefix: int, keep: float) -> Reduce:
    def reduce(x: Tensor, matrix: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        scores = matrix[:, 0, prefix:].mean(0)
        count = max(1, -(-round(keep * 1000) * len(scores) // 1000))
        best = set(scores.argsort(descending=True)[:count].tolist())
        stay = [*range(prefix), *(prefix + j for j in range(len(scores)) if j in best)]
        gone = [j for j in range(len(scores)) if j not in best]
        rows = [x[stay]]
        if gone:
            rows.append(sum(scores[j] * x[prefix + j] for j in gone)[None])
        x = torch.cat(rows)
        return x, torch.ones(len(x), dtype=x.dtype)

    return reduce


def ats(prefix: int, keep: float) -> Reduce:
    def reduce(x: Tensor, matrix: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        scores = matrix[:, 0, prefix:].sum(0) * v[:, prefix:].pow(2).sum((0, 2)).sqrt()
        order = sorted(range(len(scores)), key=scores.tolist().__getitem__)
        sums = scores[order].double().cumsum(0)
        sums = (sums - sums[0]) / (sums[-1] - sums[0])
        points = max(1, -(-round(keep * 1000) * len(scores) // 1000))
        taken = set()
        for i in range(points):
            point = i / (points - 1) if points > 1 else 1.0
            taken.add(order[int((sums - point).abs().argmin())])
        stay = [*range(prefix), *(prefix + j for j in sorted(taken))]
        return x[stay], sizes[stay]

    return reduce


def ltp(prefix: int, threshold: float) -> Reduce:
    def reduce(x: Tensor, matrix: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        scores = matrix.mean((0, 1))
        stay = [j for j in range(len(x)) if j < prefix or scores[j] >= threshold]
        if len(stay) == prefix:
            stay.append(prefix + int(scores[prefix:].argmax()))
        return x[stay], sizes[stay]

    return reduce


def tome(prefix: int, r: int) -> Reduce:
    def reduce(x: Tensor, matrix: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.nn.functional.normalize(k.mean(0), dim=-1)
        evens = [i for i in range(0, len(x), 2) if i >= prefix]
        odds = [i for i in range(1, len(x), 2) if i >= prefix]
        pairs = []
        for i in evens:
            alike = [float((keys[i] @ keys[j]).detach()) for j in odds]
            if alike:
                pairs.append((max(alike), i, odds[alike.index(max(alike))]))
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        into: dict[int, list[int]] = {j: [j] for j in range(len(x))}
        for _, i, j in pairs[: min(r, (len(x) - prefix) // 2)]:
            into[j].append(i)
            del into[i]
        order = [*range(prefix), *(i for i in evens if i in into), *odds]
        rows = [(sizes[into[j], None] * x[into[j]]).sum(0) / sizes[into[j]].sum() for j in order]
        return torch.stack(rows), torch.stack([sizes[into[j]].sum() for j in order])

    return reduce
