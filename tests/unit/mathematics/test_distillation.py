"""The distillation loss is the divergence of the two softmaxes, and what is no class scores is refused."""

from collections import OrderedDict

import pytest
import torch

from lr_callback.mathematics.distillation import class_scores, distillation_loss


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 5), (1, 2, 3, 2, 2)])
def test_it_is_the_sum_over_classes_and_the_mean_over_all_else(shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = [scores.movedim(1, -1).reshape(-1, shape[1]) for scores in (student, teacher)]
    total = 0.0
    for own, wanted in zip(*rows, strict=True):
        p, q = torch.softmax(wanted / 3, 0), torch.softmax(own / 3, 0)
        total += sum(9 * a * (a / b).log() for a, b in zip(p, q, strict=True)).item()
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(total / len(rows[0]), rel=1e-12)
    assert distillation_loss(student, student, 3.0).item() == pytest.approx(0, abs=1e-15)


def test_its_gradient_is_the_temperature_times_the_difference_of_the_softmaxes():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    student.requires_grad_()
    distillation_loss(student, teacher, 2.0).backward()
    wanted = 2.0 * (torch.softmax(student / 2, 1) - torch.softmax(teacher / 2, 1)) / 6
    torch.testing.assert_close(student.grad, wanted.detach())


def test_half_precision_is_computed_in_single():
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = distillation_loss(student, teacher, 4.0)
    assert found.dtype == torch.float32
    assert found == distillation_loss(student.float(), teacher.float(), 4.0)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ([torch.zeros(2, 3)], "it returned list. Let"),
        (torch.zeros(2, 3, dtype=torch.long), r"it returned a tensor of \(2, 3\), torch.int64\. Let"),
        (torch.zeros(2, 1), r"\(2, 1\), torch.float32\. Let"),
        (torch.zeros(()), r"a tensor of \(\), torch.float32\. Let"),
        (
            torch.zeros(2, 3, 4),
            r"\(2, 3, 4\), torch.float32\. Of three axes it cannot be told which is that of the cla",
        ),
        ({"scores": torch.zeros(2, 3)}, "it returned dict. Let"),
        ({"logits": torch.zeros(2, 3).long()}, r"a tensor of \(2, 3\), torch.int64 as 'logits'\. Let"),
        ({"out": torch.zeros(2, 3, 4)}, r"\(2, 3, 4\), torch.float32 as 'out'\. Of three axes"),
        ({"logits": None}, "it returned dict. Let"),
    ],
)
def test_what_is_no_class_scores_is_refused(output, text):
    with pytest.raises(ValueError, match=text):
        class_scores(output)


def test_scores_are_found_in_the_outputs_of_other_packages():
    scores = torch.randn(2, 5, 3)
    assert torch.equal(class_scores(OrderedDict(loss=torch.ones(()), logits=scores)), scores.mT)
    assert torch.equal(class_scores({"logits": scores[0]}), class_scores({"out": scores[0]}))
    assert class_scores({"out": scores[..., None], "aux": None}).shape == (2, 5, 3, 1)
