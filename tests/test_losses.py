"""Each term against numbers done by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from custom.encoders.patches import empty_patches, normalise_patches, patchify, unpatchify
from custom.methods.alice.branch import StudentOutput
from custom.methods.alice.losses import AliceLoss
from custom.methods.terms import cosine_distance

PATCH = (2, 2, 2)


def output(batch=2, tokens=6, visible=3, width=4, **changes):
    base = StudentOutput(
        pixels=torch.zeros(batch, tokens, 8),
        visible=torch.zeros(batch, visible, 5),
        student_pooled=torch.randn(batch, width),
        teacher_pooled=torch.randn(batch, width),
        student_tokens=torch.randn(batch, visible, width),
        teacher_tokens=torch.randn(batch, visible, width),
    )
    return base._replace(**changes)


def crop_and_mask(batch=2):
    torch.manual_seed(1)
    crop = torch.rand(batch, 1, 4, 6, 2)
    hidden = torch.tensor([[1, 1, 0, 0, 1, 0]] * batch, dtype=torch.bool).view(batch, 2, 3, 1)
    return crop, hidden


def test_patches_lie_in_grid_order_and_go_back():
    crop = torch.arange(2 * 48.0).view(2, 1, 4, 6, 2)
    patches = patchify(crop, PATCH)
    assert patches.shape == (2, 6, 8)
    assert torch.equal(patches[0, 4], crop[0, 0, 2:4, 2:4, 0:2].flatten())  # grid (1, 1, 0) of (2, 3, 1)
    assert torch.equal(unpatchify(patches, (2, 3, 1), PATCH), crop)


def test_patches_are_normalised_to_mean_0_and_variance_1():
    normal = normalise_patches(torch.rand(3, 5, 64) * 7 + 2)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(-1), torch.ones(3, 5), atol=1e-4, rtol=0)


def test_reconstruction_counts_hidden_patches_only_and_sums_q_and_k():
    crop, hidden = crop_and_mask()
    target = normalise_patches(patchify(crop, PATCH))
    wrong = target.clone()
    wrong[:, 2] += 100  # visible: must not matter
    wrong[0, 0] += 3.0  # hidden, of Q: 9 over 3 hidden patches
    wrong[1, 4] += 6.0  # hidden, of K: 36 over 3
    terms = AliceLoss(PATCH)(output(pixels=wrong), crop, hidden)
    assert float(terms["l_r"]) == pytest.approx(9 / 3 + 36 / 3, rel=1e-5)


def test_flat_patches_are_left_out_of_the_reconstruction():
    crop, hidden = crop_and_mask()
    crop[:, :, 0:2, 0:2] = 0.0  # patch 0, hidden, is air
    assert empty_patches(patchify(crop, PATCH))[0].tolist() == [True] + [False] * 5
    target = normalise_patches(patchify(crop, PATCH))
    wrong = target.clone()
    wrong[:, 0] += 50
    wrong[:, 1] += 2.0
    assert float(AliceLoss(PATCH)(output(pixels=wrong), crop, hidden)["l_r"]) == pytest.approx(
        2 * 4 / 2, rel=1e-5
    )
    kept = AliceLoss(PATCH, skip_empty=False)(output(pixels=wrong), crop, hidden)["l_r"]
    assert float(kept) == pytest.approx(2 * (2500 + 4) / 3, rel=1e-5)


def test_a_crop_of_nothing_but_air_costs_nothing():
    crop, hidden = torch.zeros(2, 1, 4, 6, 2), crop_and_mask()[1]
    assert float(AliceLoss(PATCH)(output(), crop, hidden)["l_r"]) == 0.0


def test_the_authors_reconstruction_is_the_plain_error_of_the_whole_image():
    crop, hidden = crop_and_mask()
    terms = AliceLoss(PATCH, reconstruction="whole")(output(pixels=patchify(crop, PATCH) + 0.5), crop, hidden)
    assert float(terms["l_r"]) == pytest.approx(2 * 0.25)


def test_cosine_distance_runs_from_0_to_4_and_stops_the_target_gradient():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], requires_grad=True)
    b = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.0, 0.0]], requires_grad=True)
    distance = cosine_distance(a, b)
    torch.testing.assert_close(distance, torch.tensor([0.0, 4.0, 2 - math.sqrt(2)]))
    distance.sum().backward()
    assert a.grad is not None and b.grad is None


def test_inter_volume_compares_q_with_k_and_not_with_itself():
    crop, hidden = crop_and_mask(4)
    student = torch.eye(4)
    crossed = student.roll(2, 0)
    same = AliceLoss(PATCH)(output(4, student_pooled=student, teacher_pooled=crossed), crop, hidden)
    own = AliceLoss(PATCH)(output(4, student_pooled=student, teacher_pooled=student), crop, hidden)
    assert float(same["l_dv"]) == pytest.approx(0.0, abs=1e-6)
    assert float(own["l_dv"]) == pytest.approx(2 * 2.0)  # orthogonal: 2 each, for Q and for K


def test_intra_volume_compares_token_by_token():
    crop, hidden = crop_and_mask()
    s = torch.randn(2, 3, 4)
    assert float(
        AliceLoss(PATCH)(output(student_tokens=s, teacher_tokens=5 * s), crop, hidden)["l_st"]
    ) == pytest.approx(0, abs=1e-5)
    assert float(
        AliceLoss(PATCH)(output(student_tokens=s, teacher_tokens=-s), crop, hidden)["l_st"]
    ) == pytest.approx(8, rel=1e-5)


def test_uniform_dino_logits_cost_log_p():
    crop, hidden = crop_and_mask()
    flat = torch.zeros(2, 16)
    loss = AliceLoss(PATCH, "dino", width=16)
    terms = loss(
        output(student_pooled=flat, teacher_pooled=flat, student_tokens=None, teacher_tokens=None),
        crop,
        hidden,
    )
    assert float(terms["l_dv"]) == pytest.approx(2 * math.log(16), rel=1e-5)
    assert float(terms["l_st"]) == 0.0


def test_dino_by_hand_with_centre_and_temperatures():
    crop, hidden = crop_and_mask()
    student, teacher, centre = torch.randn(2, 5), torch.randn(2, 5) * 0.01, torch.randn(5) * 0.01
    loss = AliceLoss(PATCH, "dino", width=5, teacher_temperature=(0.008, 0.01), teacher_warmup=10)
    loss.centre_pooled.copy_(centre)
    terms = loss(
        output(student_pooled=student, teacher_pooled=teacher, student_tokens=None, teacher_tokens=None),
        crop,
        hidden,
        step=5,
    )
    expected = 0.0
    for i, j in ((0, 1), (1, 0)):  # Q's student against K's teacher, and back
        target = F.softmax((teacher[j] - centre) / 0.009, -1)
        expected += float(-(target * F.log_softmax(student[i] / 0.1, -1)).sum())
    assert float(terms["l_dv"]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(loss.centre_pooled, 0.9 * centre + 0.1 * teacher.mean(0))


def test_centres_rest_in_evaluation_mode():
    crop, hidden = crop_and_mask()
    loss = AliceLoss(PATCH, "dino", width=4).eval()
    loss(output(), crop, hidden)
    assert not loss.centre_pooled.any() and not loss.centre_tokens.any()


def test_infonce_by_hand_and_against_chance():
    crop, hidden = crop_and_mask(4)
    loss = AliceLoss(PATCH, "infonce", temperature=0.5)
    same = torch.ones(4, 4)
    chance = loss(
        output(4, student_pooled=same, teacher_pooled=same, student_tokens=None, teacher_tokens=None),
        crop,
        hidden,
    )
    assert float(chance["l_dv"]) == pytest.approx(
        2 * math.log(2), rel=1e-5
    )  # two crops a side to choose from
    student = torch.eye(4)
    terms = loss(
        output(
            4,
            student_pooled=student,
            teacher_pooled=student.roll(2, 0),
            student_tokens=None,
            teacher_tokens=None,
        ),
        crop,
        hidden,
    )
    assert float(terms["l_dv"]) == pytest.approx(2 * math.log(1 + math.exp(-2.0)), rel=1e-5)


def test_infonce_of_tokens_looks_within_a_crop_only():
    crop, hidden = crop_and_mask()
    tokens = torch.eye(4)[:3].expand(2, 3, 4)
    loss = AliceLoss(PATCH, "infonce", temperature=1.0)
    terms = loss(output(student_tokens=tokens, teacher_tokens=tokens), crop, hidden)
    assert float(terms["l_st"]) == pytest.approx(2 * math.log(1 + 2 * math.exp(-1.0)), rel=1e-5)
    other = torch.cat([tokens[:1], tokens[1:] * -3])
    changed = loss(output(student_tokens=tokens, teacher_tokens=other), crop, hidden)
    own = loss(
        output(student_tokens=tokens[:1].repeat(2, 1, 1), teacher_tokens=tokens[:1].repeat(2, 1, 1)),
        crop,
        hidden,
    )
    assert float(changed["l_st"]) > float(own["l_st"]) == pytest.approx(float(terms["l_st"]))


def test_weights_and_the_similarity_ramp_scale_the_total_only():
    crop, hidden = crop_and_mask()
    out = output()
    plain = AliceLoss(PATCH)(out, crop, hidden)
    loss = AliceLoss(PATCH, weight_r=2.0, weight_dv=0.5, weight_st=0.0, similarity_start=3, similarity_ramp=4)
    terms = loss(out, crop, hidden, step=4)  # the second step of a ramp of four
    assert all(torch.equal(terms[k], plain[k]) for k in ("l_r", "l_dv", "l_st"))
    assert float(terms["total"]) == pytest.approx(
        2 * float(plain["l_r"]) + 0.25 * float(plain["l_dv"]), rel=1e-6
    )
    assert float(plain["total"]) == pytest.approx(
        sum(float(plain[k]) for k in ("l_r", "l_dv", "l_st")), rel=1e-6
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"similarity": "cosin"}, "cosine, dino, infonce"),
        ({"reconstruction": "all"}, "masked, raw, whole"),
        ({"weight_st": -1.0}, "weight_st must be 0 or more"),
    ],
)
def test_unknown_switches_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AliceLoss(PATCH, **kwargs)
