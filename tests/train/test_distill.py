"""What the student is taught: the teacher's class attention over the patches, as it is."""

from __future__ import annotations

import pytest
import sait
import small
import torch
from sait.train.config import TrainingError
from sait.train.distill import Teacher, attention_loss, logit_loss, patch_shares
from test_record_scores import attention


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_teachers_attention_is_timms(blocks):
    model, x = sait.restore(small.build()), small.images()
    got, logits = Teacher(small.build(), blocks, torch.float32)(x)
    rows = [attention(model, x, block)[:, :, 0, 1:].mean(1) for block in range(3 - blocks, 3)]
    want = torch.stack([row / row.sum(1, keepdim=True) for row in rows]).mean(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    torch.testing.assert_close(logits, model.eval()(x), rtol=1e-4, atol=1e-5)
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
        loss = attention_loss(teacher(x)[0], patch_shares(scores[0], 8, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
