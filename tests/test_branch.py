import pytest
import torch
from conftest import TINY_VIT

from custom.encoders.features import FeatureMap
from custom.encoders.masked_vit import MaskedViT
from custom.encoders.masking import hide_tokens
from custom.encoders.tokens import token_encoder
from custom.engine.ema import EMA
from custom.errors import AliceError
from custom.methods.alice.branch import ALIGNMENTS, StudentBranch, TeacherOutput
from custom.methods.alice.casa import CASA, MultiheadCASA, Nearest, OfficialCASA, Sinkhorn
from custom.methods.alice.losses import AliceLoss
from custom.methods.heads import ProjectionHead


def branch(**kwargs):
    torch.manual_seed(0)
    encoder = token_encoder(MaskedViT(**TINY_VIT, pos_embed_type="learnable"))
    small = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 4, "head_width": 64, "bottleneck": 32}
    return StudentBranch(encoder, **(small | kwargs))


def test_casa_is_the_papers_attention_written_out():
    torch.manual_seed(0)
    casa = CASA(visible_width=6, context_width=5, width=4)
    visible, context = torch.randn(2, 3, 6), torch.randn(2, 7, 5)
    normed = torch.nn.functional.layer_norm(context, (5,))
    q = torch.nn.functional.layer_norm(visible, (6,)) @ casa.query.weight.T
    k, v = normed @ casa.key.weight.T, normed @ casa.value.weight.T
    attention = torch.softmax(q @ k.transpose(1, 2) / 2.0, -1)  # sqrt(C) = 2
    torch.testing.assert_close(casa(visible, context), casa.zeta(attention @ v))
    torch.testing.assert_close(casa.attention(visible, context), attention)


def test_casa_has_no_residual_so_a_constant_context_hides_the_query():
    casa = CASA(6, 5, 4)
    context = torch.randn(1, 1, 5).expand(1, 7, 5)
    out = casa(torch.randn(1, 3, 6), context)
    torch.testing.assert_close(out[:, 0], out[:, 2])
    official = OfficialCASA(8, 2, 16).eval()
    visible = torch.randn(1, 3, 8)
    out = official(visible, torch.randn(1, 1, 8).expand(1, 7, 8))
    assert not torch.allclose(out[:, 0], out[:, 2])


def test_casa_has_four_square_maps():
    """Spec, OQ1: about 1.05 M weights at C = 512."""
    weights = sum(
        m.weight.numel()
        for m in (
            CASA(512, 512, 512).query,
            CASA(512, 512, 512).key,
            CASA(512, 512, 512).value,
            CASA(512, 512, 512).zeta,
        )
    )
    assert weights == 4 * 512 * 512


def test_the_head_ends_in_unit_vectors_or_in_cosines():
    tokens = torch.randn(2, 3, 10)
    torch.testing.assert_close(ProjectionHead(10, 16, 8)(tokens).norm(dim=-1), torch.ones(2, 3))
    head = ProjectionHead(10, 16, 8, prototypes=12)
    assert head(tokens).shape == (2, 3, 12) and head(tokens).abs().max() <= 1 + 1e-5
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("casa_teacher, pooled_from", [("shared", "decoder"), ("ema", "encoder")])
def test_gradients_reach_every_online_parameter_and_no_teacher_parameter(
    alignment, casa_teacher, pooled_from
):
    student = branch(alignment=alignment, casa_teacher=casa_teacher, pooled_from=pooled_from)
    teacher = student.make_teacher()
    crop, hidden = torch.rand(4, 1, 32, 48, 16), hide_tokens(4, (2, 3, 1), 0.5)
    output = student(crop, hidden, teacher(crop), teacher.casa)
    AliceLoss((16, 16, 16))(output, crop, hidden)["total"].backward()
    without = [
        n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # an attention's key bias shifts all logits of a row alike: its gradient is exactly nothing
    assert [n for n in without if "qkv" not in n] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert not output.teacher_pooled.requires_grad


def test_teacher_tokens_of_casa_carry_no_gradient_though_the_weights_are_shared():
    student = branch()
    teacher = student.make_teacher()
    assert teacher.casa is None
    crop, hidden = torch.rand(2, 1, 32, 48, 16), hide_tokens(2, (2, 3, 1), 0.5)
    output = student(crop, hidden, teacher(crop))
    assert output.student_tokens.requires_grad and not output.teacher_tokens.requires_grad
    assert output.student_tokens.shape == output.teacher_tokens.shape == (2, 3, 32)


def test_the_literal_paper_has_no_predictor_and_t_equals_s_where_h_equals_y():
    student = branch(predictor=False)
    visible, context = torch.randn(1, 3, 48), torch.randn(1, 6, 32)
    torch.testing.assert_close(
        student.predict_tokens(student.casa(visible, context)), student.casa(visible, context)
    )
    assert isinstance(student.predict_pooled, torch.nn.Identity)


@pytest.mark.parametrize(
    "alignment, casa_teacher",
    [
        ("casa", "shared"),
        ("casa", "ema"),
        ("casa_official", "shared"),
        ("multihead", "ema"),
        ("nearest", "shared"),
        ("sinkhorn", "shared"),
    ],
)
def test_s_looks_at_the_students_tokens_and_t_at_the_teachers(alignment, casa_teacher):
    student = branch(alignment=alignment, casa_teacher=casa_teacher, predictor=False).eval()
    teacher = student.make_teacher().eval()
    if isinstance(teacher.casa, CASA):
        torch.nn.init.normal_(teacher.casa.zeta.bias)  # so that the two CASA modules differ
    target = TeacherOutput(torch.randn(2, 6, 32), torch.randn(2, 32))
    hidden = hide_tokens(2, (2, 3, 1), 0.5)
    output = student(torch.rand(2, 1, 32, 48, 16), hidden, target, teacher.casa)
    decoded = student.decoder(output.visible, (2, 3, 1), hidden)
    raw = alignment in ("casa", "multihead")
    queries = output.visible if raw else student.head(output.visible)
    expected_s = student.casa(queries, student.head(student.decoder.features(decoded)))  # H
    expected_t = (teacher.casa or student.casa)(queries, target.tokens)  # Y
    torch.testing.assert_close(output.student_tokens, expected_s)
    torch.testing.assert_close(output.teacher_tokens, expected_t)
    assert not torch.allclose(expected_s, expected_t, atol=0.01)


def test_one_head_is_casa_to_the_bit_and_eight_are_not():
    visible, context = torch.randn(2, 3, 48), torch.randn(2, 6, 32)
    casa, one, eight = CASA(48, 32, 32), MultiheadCASA(48, 32, 32, heads=1), MultiheadCASA(48, 32, 32)
    for other in (one, eight):
        other.load_state_dict(casa.state_dict())
    assert torch.equal(casa(visible, context), one(visible, context))
    assert not torch.allclose(casa(visible, context), eight(visible, context), atol=1e-3)
    with pytest.raises(AliceError, match="not divisible by 8 heads"):
        MultiheadCASA(48, 32, 36)


def test_nearest_takes_the_token_of_the_highest_cosine_wherever_it_lies():
    context = torch.randn(2, 6, 32, requires_grad=True)
    taken = torch.tensor([[4, 0, 4], [5, 1, 2]])
    rows = torch.stack([context[b, index] for b, index in enumerate(taken)])
    visible = 3 * rows.detach() + 0.01 * torch.randn_like(rows)
    found = Nearest()(visible, context)
    torch.testing.assert_close(found, rows)
    mixed = torch.randperm(6)
    torch.testing.assert_close(Nearest()(visible, context[:, mixed]), found)
    found.sum().backward()
    used = context.grad.abs().sum(2) > 0
    assert used.nonzero().tolist() == [[0, 0], [0, 4], [1, 1], [1, 2], [1, 5]]


@pytest.mark.parametrize(
    ("cosine", "iterations", "expected"),
    [
        ([[1, 0], [0, 1]], 1, [[0.880797, 0.119203], [0.119203, 0.880797]]),
        ([[1, 1], [0, 1]], 1, [[0.80749, 0.36211], [0.19251, 0.63789]]),
        ([[1, 1], [0, 1]], 100, [[0.731059, 0.268941], [0.268941, 0.731059]]),
    ],
)
def test_sinkhorn_by_hand(cosine, iterations, expected):
    plan = Sinkhorn(0.5, iterations).plan(torch.tensor([cosine], dtype=torch.float32))
    torch.testing.assert_close(plan[0], torch.tensor(expected), atol=1e-5, rtol=0)


def test_sinkhorn_sends_and_receives_equally_much():
    plan = Sinkhorn(iterations=200).plan(torch.rand(2, 3, 6))
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 6), 0.5), atol=1e-3, rtol=0)


def test_the_teacher_sees_every_token_and_pools_them():
    teacher = branch().make_teacher()
    out = teacher(torch.rand(2, 1, 32, 48, 16))
    assert out.tokens.shape == (2, 6, 32)
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))
    assert branch(teacher_has_decoder=True).make_teacher()(torch.rand(1, 1, 32, 48, 16)).tokens.shape == (
        1,
        6,
        32,
    )


def test_ema_by_hand_over_everything_they_share():
    student = branch(casa_teacher="ema")
    teacher = student.make_teacher()
    ema = EMA(teacher, student)
    assert len(ema.parameters) == len(list(teacher.parameters()))
    assert float(ema.drift()) == 0.0
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    assert float(ema.drift()) > 0
    ema.update(0.9)
    own = dict(student.named_parameters())
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * own[name])
    ema.update(1.0)
    after = {n: p.clone() for n, p in teacher.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in teacher.named_parameters())


def test_ema_copies_buffers_whatever_its_momentum():
    student, teacher = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    student(torch.randn(7, 3) + 5)
    EMA(teacher, student).update(0.9)
    assert teacher.num_batches_tracked == 1
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, dict(student.named_buffers())[name]), name


def test_ema_refuses_networks_that_differ():
    student = branch()
    teacher = student.make_teacher()
    teacher.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="student has no extra"):
        EMA(teacher, student)
    with pytest.raises(ValueError, match="momentum must be in"):
        EMA(student.make_teacher(), student).update(1.5)


def test_a_feature_map_is_the_encoders_tokens_on_their_grid():
    net = MaskedViT(**TINY_VIT).eval()
    crop = torch.rand(2, 1, 32, 48, 16)
    grid = FeatureMap(net)(crop)
    assert grid.shape == (2, 48, 2, 3, 1)
    torch.testing.assert_close(grid[1, :, 1, 2, 0], net(crop)[0][1, 5])
    twin = FeatureMap(MaskedViT(**TINY_VIT)).eval().with_weights(net.state_dict())
    assert torch.equal(twin(crop), grid)
    twin.load_state_dict(FeatureMap(net).state_dict())


def test_unknown_switches_name_the_known_ones():
    with pytest.raises(ValueError, match="alignment must be one of casa"):
        branch(alignment="cassa")
    with pytest.raises(ValueError, match="casa_teacher must be one of shared, ema"):
        branch(casa_teacher="own")
    with pytest.raises(ValueError, match="Linear is not an encoder"):
        token_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"side y = 40 .* take 32 or 48"):
        branch().encoder.units((32, 40, 16))
