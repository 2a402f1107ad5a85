"""LAMB against timm's, against its formula in float64, and in what may happen to an optimizer."""

import copy
import io
import itertools
import math
import pickle

import pytest
import timm.optim
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.training import lamb
from workbench.training.lamb import LAMB

STEPS = 50
SHAPES = [(300, 7), (6, 3, 3, 3), (8, 5, 1, 1), (37,), (4,), (1,), (), (2, 3, 4)]
OPTIONS = [
    {"weight_decay": decay, "max_grad_norm": norm, "trust_clip": clip, "always_adapt": adapt}
    for decay, norm, clip, adapt in itertools.product(
        [0.0, 0.02], [None, 1.0], [False, True], [False, True]
    )
]
GROUPS = [
    {"lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.99), "trust_clip": True},
    {"lr": 0.004, "eps": 1e-3, "always_adapt": True},
    {"lr": 0.01},
]
USUAL = {"lr": 0.02, "weight_decay": 0.02, "max_grad_norm": 1.0}
EMPTY = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def parameters(dtype=torch.float32, channels_last=False) -> list[torch.nn.Parameter]:
    """Of every kind a network has: random ones, then some of zeros. Always the same."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    tensors = [t.to(dtype) for t in drawn + [torch.zeros_like(t) for t in drawn[1::2]]]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensors = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors]
    return [torch.nn.Parameter(t) for t in tensors]


def gradients(params, step: int) -> list[torch.Tensor]:
    """Of a step, always the same: small and large by turns, so that some steps are clipped."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = 10.0 ** -(step % 4)
    return [
        (size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for p in params
    ]


def trained(optimizer, params, steps=range(STEPS)) -> list[torch.Tensor]:
    """The parameters after these steps."""
    for step in steps:
        for p, gradient in zip(params, gradients(params, step), strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)
        optimizer.step()
    return [p.detach() for p in params]


def grouped(params, options=GROUPS) -> list[dict]:
    """A parameter group for each of the options, with random tensors and zeros in every one."""
    return [{"params": params[i :: len(options)], **one} for i, one in enumerate(options)]


@torch.no_grad()
def by_formula(params, groups, max_grad_norm=None, steps=STEPS, gradients=gradients):
    """Slow and plain: the float64 parameters after these steps."""
    state = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in params}
    for step in range(steps):
        given = dict(zip(params, gradients(params, step), strict=True))
        total = math.sqrt(sum(float(g.square().sum()) for g in given.values()))
        scale = 1.0 if max_grad_norm is None else max(1.0, total / max_grad_norm)
        for group in [EMPTY | group for group in groups]:
            (b1, b2), decay, s = group["betas"], group["weight_decay"], step + 1
            for p in group["params"]:
                g, (m, v) = given[p] / scale, state[p]
                m, v = state[p] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                u = (m / (1 - b1**s)) / (v.sqrt() / math.sqrt(1 - b2**s) + group["eps"]) + decay * p
                r, norms = 1.0, [math.sqrt(float((x * x).sum())) for x in (p, u)]
                if (decay != 0 or group.get("always_adapt")) and min(norms) > 0:
                    r = norms[0] / norms[1]
                r = min(r, 1.0) if group.get("trust_clip") else r
                p.data = p.data - group["lr"] * r * u
    return [p.detach() for p in params]


def assert_close(ours, theirs, within: float):
    """Largest difference, tensor by tensor, relative to the largest element."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        difference = (a.double() - b.double()).abs().max()
        assert difference <= within * b.double().abs().max(), (tuple(a.shape), float(difference))


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lamb_is_timms_in_any_memory_format(options, dtype):
    ours, theirs = parameters(dtype, channels_last=True), parameters(dtype)
    strides, optimizer = [p.stride() for p in ours], LAMB(ours, lr=0.02, **options)
    assert_close(
        trained(optimizer, ours),
        trained(timm.optim.Lamb(theirs, lr=0.02, **options), theirs),
        within=1e-6,
    )
    assert [p.stride() for p in ours] == strides != [p.stride() for p in theirs]
    assert [optimizer.state[p]["exp_avg"].stride() for p in ours] == strides


@every_option
def test_lamb_is_its_formula(options):
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    of_group = {k: v for k, v in options.items() if k != "max_grad_norm"}
    assert_close(
        trained(LAMB(ours, lr=0.02, **options), ours),
        by_formula(plain, [{"params": plain, "lr": 0.02, **of_group}], options["max_grad_norm"]),
        within=1e-9,
    )


@pytest.mark.parametrize("groups, norm", [(GROUPS, None), (GROUPS, 0.5), ([{}], None)])
def test_groups_and_defaults_are_those_of_the_formula_and_clipped_together(groups, norm):
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    assert_close(
        trained(LAMB(grouped(ours, groups), max_grad_norm=norm), ours),
        by_formula(plain, grouped(plain, groups), norm),
        within=1e-9,
    )


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_bfloat16_ends_near_float32(options):
    """bfloat16 keeps 8 bits: half a unit in the last place lost in each of ten steps."""
    ours = parameters(torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    trained(LAMB(exact, lr=0.02, **options), exact, range(10))
    optimizer = LAMB(ours, lr=0.02, **options)
    assert_close(trained(optimizer, ours, range(10)), exact, within=10 * 2**-9)
    assert {p.dtype for p in ours} == {torch.bfloat16}
    assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_norms_beyond_float16_do_not_overflow():
    weight = torch.nn.Parameter(torch.full((10_000,), 1000.0, dtype=torch.float16))  # norm 1e5
    weight.grad = torch.full_like(weight, 1000.0)
    LAMB([weight], lr=0.1, always_adapt=True, max_grad_norm=1e3).step()
    assert weight.grad.tolist() == pytest.approx([10.0] * 10_000, rel=2**-10)
    assert weight.tolist() == pytest.approx([900.0] * 10_000, rel=2**-10)  # |u| is 100


def test_one_group_may_mix_dtypes():
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    mixed = [p if i % 3 else torch.nn.Parameter(p.detach().float()) for i, p in enumerate(ours)]
    plain_group = {"params": plain, "lr": 0.02, "weight_decay": 0.02}
    theirs = by_formula(plain, [plain_group], 1.0)
    assert_close(trained(LAMB(mixed, **USUAL), mixed), theirs, within=1e-6)
    assert {p.dtype for p in mixed} == {torch.float32, torch.float64}


def test_the_size_of_a_cpus_batches_changes_no_bit(monkeypatch):
    whole, cut = parameters(), parameters()
    trained(LAMB(whole, weight_decay=0.02), whole)
    monkeypatch.setattr(lamb, "_BATCH", 40)
    trained(LAMB(cut, weight_decay=0.02), cut)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


# ---- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_and_loaded_state_resumes_bit_by_bit(dtype):
    straight, resumed = parameters(dtype, True), parameters(dtype, True)
    trained(LAMB(grouped(straight), max_grad_norm=1.0), straight)

    first = LAMB(grouped(resumed), max_grad_norm=1.0)
    trained(first, resumed, range(20))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LAMB(grouped(resumed, [{}] * 3), lr=9.0, max_grad_norm=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert {s["step"].dtype for s in second.state.values()} == {torch.float32}
    assert {s["exp_avg_sq"].dtype for s in second.state.values()} == {dtype}
    trained(second, resumed, range(20, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_loaded_state_moves_to_its_parameters_device():
    weight = torch.nn.Parameter(torch.ones(3))
    saved = LAMB([weight])
    trained(saved, [weight], range(1))
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    loaded = LAMB([elsewhere])
    loaded.load_state_dict(saved.state_dict())
    assert {value.device.type for value in loaded.state[elsewhere].values()} == {"meta"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_the_optimizer_clips_too(copied):
    optimizer = copied(LAMB(parameters(), max_grad_norm=0.25))
    assert optimizer.max_grad_norm == 0.25
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_parameter_without_gradient_does_not_move_and_does_not_count():
    params = parameters()[:3]
    before = params[1].detach().clone()
    optimizer = LAMB(params, weight_decay=0.02, max_grad_norm=1.0)
    optimizer.step()  # nothing has a gradient yet
    assert not optimizer.state
    for step in range(6):
        params[0].grad = torch.ones_like(params[0])
        params[2].grad = torch.ones_like(params[2]) if step % 2 else None
        optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert [optimizer.state[params[i]]["step"].item() for i in (0, 2)] == [6.0, 3.0]
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


# ---- gradients


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"always_adapt": True}, {}], ids=str)
def test_clipping_survives_gradients_of_norm_zero(options):
    ours, plain = parameters(torch.float64), parameters(torch.float64)
    optimizer = LAMB(ours, lr=0.02, max_grad_norm=1.0, **options)
    zeros = lambda params, step: [torch.zeros_like(p) for p in params]
    for step in range(3):
        for p, gradient in zip(ours, zeros(ours, step), strict=True):
            p.grad = gradient
        optimizer.step()
    by_formula(plain, [{"params": plain, "lr": 0.02, **options}], 1.0, 3, zeros)
    assert_close(ours, plain, within=1e-12)


def test_gradients_below_the_limit_are_not_touched_and_those_above_are_scaled():
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 0.5)  # norm 1
    for norm, left in ((1.0, 0.5), (0.5, 0.25)):
        LAMB([weight], max_grad_norm=norm).step()
        assert torch.equal(weight.grad, torch.full((4,), left))


@pytest.mark.parametrize("adapt, expected", [(False, 1.9), (True, 1.8)])  # u is 1, the ratio 2
def test_empty_tensors_and_scalars_take_part(adapt, expected):
    params = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in [(0,), (), (3, 0), (1, 1)]]
    for p in params:
        p.grad = torch.ones_like(p)
    LAMB(params, lr=0.1, always_adapt=adapt, max_grad_norm=10.0).step()
    values = torch.cat([p.detach().flatten() for p in params])
    assert values.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_sparse_gradients_are_an_error_and_nothing_moves():
    first, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(5, 2, sparse=True)
    first.grad = torch.ones(3)
    table(torch.tensor([1, 1])).sum().backward()
    optimizer = LAMB([{"params": [first]}, {"params": [table.weight]}])
    with pytest.raises(RuntimeError, match="LAMB needs dense gradients.*torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3)) and not optimizer.state


def test_a_closure_is_called_with_gradients_on_and_its_loss_is_returned():
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = LAMB([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 12.0
    assert weight.tolist() == pytest.approx([1.999] * 3)


# ---- memory


def test_gradients_and_states_of_another_memory_format_are_reordered():
    ours, theirs = parameters(), parameters()
    optimizer, plain = LAMB(ours, **USUAL), LAMB(theirs, **USUAL)
    trained(optimizer, ours, range(5))
    for p in ours:
        if p.dim() == 4:  # as model.to(memory_format=torch.channels_last) does
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    for p, gradient in zip(ours, gradients(ours, 5), strict=True):
        p.grad = gradient  # contiguous
    optimizer.step()
    assert_close(ours, trained(plain, theirs, range(6)), within=1e-6)


def test_an_expanded_gradient_counts_every_element():
    ours, theirs = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    ours.grad, theirs.grad = torch.tensor(2.0).expand(2, 3), torch.full((2, 3), 2.0)
    for p in (ours, theirs):
        LAMB([p], max_grad_norm=1.0, eps=0.1).step()
    assert torch.equal(ours, theirs)


def test_a_slice_of_a_tensor_can_be_trained():
    table = torch.ones(4, 6)
    ours, theirs = table[:, ::2].requires_grad_(), torch.ones(4, 3).requires_grad_()
    for p in (ours, theirs):
        trained(LAMB([p], **USUAL), [p], range(5))
    assert_close([ours], [theirs], within=1e-6)
    assert (table[:, 1::2] == 1).all()


# ---- waiting for the device


class Waits(TorchDispatchMode):
    """Notes every operation that brings a number from the device to Python, or sizes by content."""

    SIGNS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found += {function.overloadpacket.__name__} & set(self.SIGNS)
        return function(*args, **(kwargs or {}))


@every_option
def test_a_step_reads_no_number_from_the_device(options, monkeypatch):
    params = parameters()
    optimizer = LAMB(params, **options)
    for name in ("tolist", "numpy"):  # these pass no dispatcher
        monkeypatch.setattr(torch.Tensor, name, None)
    with Waits() as waits:
        trained(optimizer, params, range(2))
        assert waits.found == []
        torch.ones(1).item()
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs WORKBENCH_TEST_DEVICE=cuda")
def test_a_gpu_agrees_with_the_cpu_and_is_never_waited_for():
    ours, theirs = parameters(channels_last=True), parameters()
    ours = [torch.nn.Parameter(p.detach().cuda()) for p in ours]
    optimizer = LAMB(grouped(ours), max_grad_norm=1.0)
    for step in range(STEPS):
        for p, gradient in zip(ours, gradients(ours, step), strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    theirs = trained(LAMB(grouped(theirs), max_grad_norm=1.0), theirs)
    assert_close([p.detach().cpu() for p in ours], theirs, within=1e-5)


# ---- values out of range


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": math.nan}, "lr is nan: at least 0 and finite"),
        ({"eps": -1e-8}, "eps is -1e-08: at least 0"),
        ({"weight_decay": math.inf}, "weight_decay is inf: at least 0 and finite"),
        ({"betas": (1.0, 0.999)}, r"betas is \(1.0, 0.999\): two numbers, at least 0 and below 1"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\): two numbers"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LAMB(parameters(), **options)
    optimizer = LAMB([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_a_norm_to_clip_to_is_above_zero_and_of_the_whole_optimizer(norm):
    with pytest.raises(ValueError, match=f"max_grad_norm is {norm}: a number above 0, or None"):
        LAMB(parameters(), max_grad_norm=norm)
    with pytest.raises(ValueError, match="max_grad_norm is set for the whole optimizer"):
        LAMB([{"params": parameters(), "max_grad_norm": norm}], max_grad_norm=1.0)
