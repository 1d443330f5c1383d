"""What the student is taught: the teacher's class attention over the patches, as it is."""

from __future__ import annotations

import pytest
import sait
import small
import torch
from sait.train.config import TrainingError
from sait.train.distill import Teacher, attention_loss, logit_loss, patch_shares
from sait.train.manifold import last_features, manifold_loss, same_tokens
from test_record_scores import attention


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_teachers_attention_is_timms(blocks):
    model, x = sait.restore(small.build()), small.images()
    got, logits, features = Teacher(small.build(), blocks, torch.float32)(x)
    rows = [attention(model, x, block)[:, :, 0, 1:].mean(1) for block in range(3 - blocks, 3)]
    want = torch.stack([row / row.sum(1, keepdim=True) for row in rows]).mean(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    torch.testing.assert_close(logits, model.eval()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, model.forward_features(x), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad


def test_a_teacher_has_the_blocks_that_are_asked_for():
    with pytest.raises(TrainingError, match="teacher_blocks: expected at most 3"):
        Teacher(small.build(), 4, torch.float32)


def test_attention_loss_is_the_divergence():
    teacher, student = torch.rand(2, 4, 9, dtype=torch.float64).softmax(-1)
    want = (teacher * (teacher / student).log()).sum(1).mean()
    torch.testing.assert_close(attention_loss(teacher, student), want)
    assert attention_loss(teacher, teacher).abs() < 1e-12
    zero = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = attention_loss(torch.tensor([[0.5, 0.5]]), zero)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, zero)[0].isfinite().all()


def test_logit_loss_is_the_divergence_of_softened_answers():
    teacher, student = torch.randn(2, 4, 10)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    torch.testing.assert_close(logit_loss(teacher, student, 3.0), 9 * (p * (p / q).log()).sum(1).mean())


def test_patch_shares_leave_prefix_tokens_out():
    shares = patch_shares(torch.tensor([5.0, 1, 3, 7, 2, 2]), images=2, num_prefix=1)
    torch.testing.assert_close(shares, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    shares = patch_shares(torch.tensor([5.0, 4, 1, 3, 7, 6, 2, 2]), images=2, num_prefix=2)
    torch.testing.assert_close(shares, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_learning_from_attention_alone_moves_the_scores_towards_the_teacher():
    torch.manual_seed(3)
    teacher, student = Teacher(small.build(), 1, torch.float32), small.build(keep=1.0)
    x = small.images(8)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for step in range(30):
        sait.set_density(student, keep=(1.0, 0.5)[step % 2])
        with sait.record_scores(student) as scores:
            student(x)
        loss = attention_loss(teacher(x).attention, patch_shares(scores[0], 8, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_manifold_loss_is_the_difference_of_gram_matrices():
    teacher, student = torch.randn(4, 9, 16), torch.randn(4, 9, 8)
    t, s = (x / x.norm(dim=-1, keepdim=True) for x in (teacher, student))
    within = (torch.einsum("bic,bjc->bij", t, t) - torch.einsum("bic,bjc->bij", s, s)).square().mean()
    across = (torch.einsum("anc,bnc->nab", t, t) - torch.einsum("anc,bnc->nab", s, s)).square().mean()
    rows_t, rows_s = t.reshape(36, 16), s.reshape(36, 8)  # fewer than are sampled: all of them
    everything = (rows_t @ rows_t.T - rows_s @ rows_s.T).square().mean()
    want = 4 * within + 0.1 * across + 0.2 * everything
    torch.testing.assert_close(manifold_loss(teacher, student), want)
    assert manifold_loss(teacher, 3 * teacher) < 1e-10


def test_the_teacher_is_compared_at_the_tokens_that_the_student_kept():
    model, x = small.build(keep=5), small.images()
    with last_features(model) as features:
        model(x)
    assert features[0].shape == (3, 6, 32)
    (kept,) = sait.selections(model)
    theirs = torch.arange(3 * 18.0).view(3, 18, 1)  # two prefix tokens, the student has one
    got = same_tokens(theirs, 2, kept, 1)
    rows = kept.indices.view(3, 6)[:, 1:]
    want = torch.stack([18 * b + 2 + (rows[b] - 17 * b - 1) for b in range(3)]).float()
    assert torch.equal(got[..., 0], want)
