"""New scorers, selectors and methods, each in one file of this folder by public names only, against plain torch."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import cells
import farewell
import predictor
import pytest
import sait
import timm
import torch
import torchvision_vit
from helpers import assert_model_as_exact_as_torch, assert_same_bits
from predictor import Predictor, predictor_plan
from sait.methods import ClassAttention, ColumnAttention, TopK, TopP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer as VisionTransformerOfTorchvision

import sait_kernels as sk

FILES = (predictor, cells, farewell, torchvision_vit)
LEARNED = ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias")
SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 10}  # 16 patches, a class token


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=seeded(1))


def attention_of(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the matrix (H, n, n), x after the attention residual (n, C)) of one image (n, C), by timm's modules."""
    attn, n = block.attn, len(x)
    q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    matrix = (q @ k.mT * attn.scale).softmax(-1)
    return matrix, x + attn.proj((matrix @ v).transpose(0, 1).flatten(1))


def entering(model: Any, x: Tensor, block: int) -> Tensor:
    """(B, N, C) in front of a block."""
    return model.blocks[:block](model._pos_embed(model.patch_embed(x)))


def leaving(model: Any, block: Any, x: Tensor) -> Tensor:
    """The logits of one image whose rows (n, C) have the attention of a block behind them."""
    x = (x + block.mlp(block.norm2(x)))[None]
    for later in list(model.blocks)[list(model.blocks).index(block) + 1 :]:
        x = later(x)
    return model.forward_head(model.norm(x))[0]


@pytest.mark.parametrize("file", FILES)
def test_public_names_are_enough(file: Any) -> None:
    """Of sait what `sait`, `sait.methods` and `sait.families` list, of sait_kernels what it lists."""
    tree = ast.parse(Path(file.__file__).read_text(encoding="utf-8"))
    public = {"sait": set(sait.__all__), "sk": set(sk.__all__)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sait"):
            module = {"sait.methods": sait.methods, "sait.families": sait.families}[node.module or ""]
            assert {alias.name for alias in node.names} <= set(module.__all__)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in public:
            assert node.attr in public[node.value.id]


def test_the_page_shows_these_files() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"`(tests/extension/\w+\.py)`:\n\n```python\n(.*?)```\n", page, re.DOTALL)
    assert {path for path, _ in shown} == {f"tests/extension/{file.__name__}.py" for file in FILES}
    for path, code in shown:
        assert code == (root / path).read_text(encoding="utf-8"), f"docs/extending.md shows another {path}"


def of_torchvision() -> Any:
    torch.manual_seed(0)
    model = VisionTransformerOfTorchvision(64, 16, num_layers=4, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def torchvision_oracle(model: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
    """torchvision's own blocks, image by image; behind the second of them the rows that ``kept`` names."""
    logits = []
    for image, rows in zip(x, kept, strict=True):
        tokens = torch.cat([model.class_token, model._process_input(image[None])], 1) + model.encoder.pos_embedding
        for i, block in enumerate(model.encoder.layers):
            tokens = block(tokens)
            tokens = tokens[:, rows] if i == 1 else tokens
        logits.append(model.heads(model.encoder.ln(tokens)[:, 0]))
    return torch.cat(logits)


@pytest.mark.parametrize("density", [{"keep": 0.5}, {"mass": 0.7}], ids=str)
@torch.no_grad()
def test_a_family_of_another_library(density: dict[str, float], backend: str) -> None:
    """torchvision's ViT: pruned, optimized, its maps, its cost, and restored."""
    model, x = of_torchvision(), images()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    dense = plain(x)
    sait.sparsify(model, block=1, **density)
    for optimized in (False, True):
        got = (sait.optimize(model) if optimized else model)(x)
        mask, grid = sait.kept_mask(model)
        assert grid == (4, 4)
        kept = [torch.cat([torch.tensor([0]), 1 + row.nonzero()[:, 0]]) for row in mask]
        exact, in_torch = torchvision_oracle(wide, x.double(), kept), partial(torchvision_oracle, plain, x, kept)
        assert_model_as_exact_as_torch("logits", got, exact, in_torch)
    assert sait.full_maps(model, x).maps[0].shape == (3, 64, 4, 4)
    of_block = 17 * 3 * 64**2 + 2 * 17 * 17 * 64 + 17 * (64**2 + 2 * 64 * 128)
    assert sait.macs(model, plan=sait.Plan([sait.Stage(1, 1.0)])) == 4 * of_block + 16 * 16**2 * 3 * 64 + 64 * 9
    assert_same_bits("dense", sait.set_density(model)(x), dense)
    assert_same_bits("restored", sait.restore(model)(x), dense)
    assert type(model) is VisionTransformerOfTorchvision


def test_a_family_refuses_what_it_does_not_know() -> None:
    class OwnForward(VisionTransformerOfTorchvision):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    size = {"num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 64}
    with pytest.raises(TypeError, match="OwnForward has a forward of its own"):
        sait.sparsify(OwnForward(64, 16, **size), block=0, keep=0.5)
    with pytest.raises(ValueError, match="encoder_layer_0: expected attention_dropout=0"):
        sait.sparsify(VisionTransformerOfTorchvision(64, 16, **size, attention_dropout=0.1), block=0, keep=0.5)
    wrapped = torch.nn.Sequential(of_torchvision())
    with pytest.raises(TypeError, match=r"it wraps the model; call sparsify on its \.0, a VisionTransformer"):
        sait.sparsify(wrapped, block=0, keep=0.5)


def test_the_best_of_each_cell(backend: str) -> None:
    model, x = build(), images()
    wide = copy.deepcopy(model).double()
    plan = sait.Plan([sait.Stage(1, ColumnAttention(), cells.BestOfCells(3)), sait.Stage(3, ClassAttention(), TopK(2))])

    def oracle(plain: Any, x: Tensor) -> Tensor:
        answers = []
        for tokens in entering(plain, x, 1):
            matrix, attended = attention_of(plain.blocks[1], tokens)
            scores = matrix.mean((0, 1))[1:]
            kept = [0] + [1 + 3 * i + int(cell.argmax()) for i, cell in enumerate(scores.split(3))]
            out = attended[kept]
            rows = (out + plain.blocks[1].mlp(plain.blocks[1].norm2(out)))[None]
            rows = plain.blocks[2](rows)[0]
            matrix, attended = attention_of(plain.blocks[3], rows)
            best = matrix[:, 0].mean(0)[1:].topk(2).indices.sort().values + 1
            answers.append(leaving(plain, plain.blocks[3], attended[[0, *best.tolist()]]))
        return torch.stack(answers)

    with torch.no_grad():
        got = sait.sparsify(copy.deepcopy(model), plan)
        logits = got(x)
        assert [s.max_seqlen for s in sait.selections(got)] == [1 + 6, 1 + 2]
        assert_model_as_exact_as_torch("logits", logits, oracle(wide, x.double()), partial(oracle, model, x))


@pytest.mark.parametrize("selector", [TopK(0.5), TopP(0.6)], ids=str)
def test_what_is_dropped_leaves_its_mean(selector: Any, backend: str) -> None:
    plain, x = build(), images()
    wide = copy.deepcopy(plain).double()
    model = sait.sparsify(
        copy.deepcopy(plain), sait.Plan([sait.Stage(1, ClassAttention(), selector, farewell.Farewell())])
    )
    with torch.no_grad():
        got = model(x)
        (chosen,) = sait.selections(model)
        starts, rows = chosen.cu_seqlens.tolist(), chosen.indices.tolist()

        def oracle(plain: Any, x: Tensor) -> Tensor:
            answers = []
            for b, tokens in enumerate(entering(plain, x, 1)):
                kept = [row - 17 * b for row in rows[starts[b] : starts[b + 1]]]
                dropped = [row for row in range(17) if row not in kept]
                assert dropped
                _, attended = attention_of(plain.blocks[1], tokens)
                left = attended[kept]
                left[0] += attended[dropped].mean(0)
                answers.append(leaving(plain, plain.blocks[1], left))
            return torch.stack(answers)

        assert_model_as_exact_as_torch("logits", got, oracle(wide, x.double()), partial(oracle, plain, x))
    alone = torch.cat([model(image[None]) for image in x]).detach()
    torch.testing.assert_close(alone, got, rtol=0, atol=64 * torch.finfo(torch.float32).eps * got.abs().max().item())


def task(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(images, labels, the patch that tells the label): noise, and one patch with the sign of one of two patterns."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    places = torch.randint(0, 16, (count,), generator=generator)
    x = torch.randn(count, 3, 64, 64, generator=generator)
    for image, label, place in zip(x, labels, places, strict=True):
        row, column = divmod(int(place), 4)
        patch = image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        patch += 2.0 * (1 - 2 * label)
    return x, labels, places


def test_a_predictor_learns_end_to_end() -> None:
    """From the labels alone which patches matter: a quarter of them stay, and among them is the one that tells."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 2, "depth": 2})
    sait.sparsify(model, predictor_plan(64, block=0, keep=0.25)).train()
    learned = [name for name, _ in model.named_parameters() if "sait_methods" in name]
    assert learned == [f"sait_methods.scorer0.{part}" for part in LEARNED]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    generator = seeded(0)
    for _ in range(120):
        x, labels, _ = task(32, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in learned)
    x, labels, places = task(128, seeded(1))
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == labels).float().mean()
        mask, _ = sait.kept_mask(model)
    found = mask[torch.arange(128), places].float().mean()
    assert found > 0.9, "by chance it would be a quarter"
    assert right > 0.95


@torch.no_grad()
def test_what_is_learned_is_saved_copied_and_taken_away(tmp_path: Path) -> None:
    model, x = build(), images()
    keys = list(model.state_dict())
    sait.sparsify(model, predictor_plan(64, block=1, keep=0.5))
    torch.nn.init.normal_(model.sait_methods["scorer1"].out.weight)
    want = model(x)
    assert [key for key in model.state_dict() if key not in keys] == [
        f"sait_methods.scorer1.{part}" for part in LEARNED
    ]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_bits("copy", other(x), want)
        other.sait_methods["scorer1"].out.weight.zero_()
        assert not sait.density(other).stages[0].scorer.out.weight.any(), "one predictor, not two"
        assert_same_bits("original", model(x), want)
    sait.save(model, tmp_path / "model.safetensors", name="vit_tiny_patch16_224", kwargs=SMALL)
    loaded = sait.load(tmp_path / "model.safetensors")
    assert isinstance(sait.density(loaded).stages[0].scorer, Predictor)
    assert_same_bits("loaded", loaded(x), want)
    half = copy.deepcopy(model).bfloat16()
    assert half.sait_methods["scorer1"].out.weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).isfinite().all()
    sait.set_density(model, keep=0.25)(x)
    assert sait.selections(model)[0].max_seqlen == 1 + 4, "another density, the same predictor"
    with pytest.raises(ValueError, match=r"learns.*Predictor.*sparsify"):
        sait.set_density(model, predictor_plan(64, block=1, keep=0.5))
    sait.sparsify(model, block=1, keep=0.5)
    assert list(model.state_dict()) == keys
    sait.sparsify(model, predictor_plan(64, block=1, keep=0.5))
    assert list(sait.restore(model).state_dict()) == keys


@torch.no_grad()
def test_a_stage_before_the_last_block_of_an_optimized_model() -> None:
    """The block leaves what the head reads; what the stage kept is recorded all the same."""
    model, x = build(), images()
    scorer = Predictor(64)
    torch.nn.init.normal_(scorer.out.weight)
    sait.sparsify(model, sait.Plan([sait.Stage(1, 0.5), sait.Stage(3, scorer, TopK(0.5), before=True)]))
    want, recorded = model(x), sait.selections(model)
    got = sait.optimize(model)(x)
    assert [kept.max_seqlen for kept in recorded] == [1 + 8, 1 + 4]
    for kept, again in zip(recorded, sait.selections(model), strict=True):
        assert torch.equal(kept.indices, again.indices)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    with sait.record_scores(model) as scores:
        model(x)
    assert [len(of_stage) for of_stage in scores] == [3 * 17, 3 * 9]


@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_a_stage_before_its_block(before: bool, backend: str) -> None:
    """Where tokens are dropped ahead of it, the block's keys are those that stay."""
    model, x = build(), images()
    scorer = Predictor(64)
    torch.nn.init.normal_(scorer.out.weight)
    wide, wide_scorer = copy.deepcopy(model).double(), copy.deepcopy(scorer).double()
    sait.sparsify(model, sait.Plan([sait.Stage(1, scorer, TopK(0.5), before=before)]))
    got = model(x)

    def oracle(plain: Any, score: Any, x: Tensor) -> Tensor:
        answers = []
        for tokens in entering(plain, x, 1):
            of_patches = score(sait.Seen(tokens, None))[1:]
            kept = [0, *(of_patches.topk(8).indices.sort().values + 1).tolist()]
            if before:
                tokens = tokens[kept]
            _, attended = attention_of(plain.blocks[1], tokens)
            answers.append(leaving(plain, plain.blocks[1], attended if before else attended[kept]))
        return torch.stack(answers)

    in_torch = partial(oracle, sait.restore(copy.deepcopy(model)), scorer, x)
    assert_model_as_exact_as_torch("logits", got, oracle(wide, wide_scorer, x.double()), in_torch)
    assert sait.selections(model)[0].max_seqlen == 9
    tokens, kept = 17, 9
    linear = 12 * 64 * 64
    entering_rows = kept if before else tokens
    of_block = entering_rows * 3 * 64 * 64 + kept * 9 * 64 * 64 + 2 * kept * entering_rows * 64 + tokens * 16 * 65
    dense = tokens * linear + 2 * tokens * tokens * 64
    later = kept * linear + 2 * kept * kept * 64
    assert sait.macs(sait.set_density(model)) - sait.macs(model, plan=model._sait.plan) == (
        3 * dense - of_block - 2 * later
    )
