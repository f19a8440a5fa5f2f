"""Muon is the formula of PyTorch's for matrices and AdamW for the rest, without a number that the host must know."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import DEVICE, default_dtype, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from memtrans import MemorizingTransformer
from memtrans.training.muon import Muon, nearly_orthogonal
from memtrans.training.optimizer import make_optimizer
from memtrans.training.settings import Settings

pytestmark = pytest.mark.device

MATRICES = ((5, 7), (7, 5), (6, 6), (1, 4), (5, 7))
OTHERS = ((6,), (4, 1, 1), (9, 3), ())
STEPS = 30


def parameters_of(shapes: tuple[tuple[int, ...], ...]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(3 * torch.randn(shape, generator=seeded(len(shape)))) for shape in shapes]


def groups_of(matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": matrices}, {"params": others, "orthogonal": False}]


def both() -> tuple[list[torch.nn.Parameter], Muon]:
    """Matrices and others, and an optimiser that moves them."""
    matrices, others = parameters_of(MATRICES), parameters_of(OTHERS)
    return [*matrices, *others], Muon(groups_of(matrices, others), lr=torch.tensor(0.02), weight_decay=0.1)


def move(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = seeded(seed)
    for weight in parameters:
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * (1 + seed % 5)
    optimizer.step()


def assert_same_after_steps(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    found, expected = ([p for g in one.param_groups for p in g["params"]] for one in (ours, theirs))
    for step in range(STEPS):
        move(ours, found, step)
        move(theirs, expected, step)
    for weight, like in zip(found, expected, strict=True):
        assert_close(weight, like, SAME_GRAPH, str(tuple(weight.shape)))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"momentum": 0.5}, {"momentum": 0.0}])
def test_it_moves_matrices_as_pytorchs_does(options, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # PyTorch's rounds whatever it is given
    theirs = torch.optim.Muon(
        parameters_of(MATRICES), lr=0.02, adjust_lr_fn="match_rms_adamw", **{"weight_decay": 0.0, **options}
    )
    assert_same_after_steps(Muon(parameters_of(MATRICES), lr=0.02, dtype=torch.float32, **options), theirs)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}])
def test_it_moves_the_rest_as_adamw_does(options):
    theirs = torch.optim.AdamW(parameters_of(OTHERS), lr=0.02, **{"betas": (0.9, 0.95), "weight_decay": 0.0, **options})
    assert_same_after_steps(Muon(groups_of([], parameters_of(OTHERS)), lr=0.02, **options), theirs)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_singular_values_of_a_step_are_near_1(shape, dtype):
    found = nearly_orthogonal(torch.randn((3, *shape), generator=seeded(0)), dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.float())
    assert values.median() > 0.7
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(48, 64), (64, 256), (256, 64)])
def test_a_step_has_the_size_of_a_step_of_adamw(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    move(Muon([weight], lr=0.1), [weight], 0)
    assert 0.015 < float(weight.detach().square().mean().sqrt()) < 0.022  # about 0.2 of the rate


def test_products_are_in_bfloat16_on_a_gpu_and_in_float32_elsewhere():
    expected = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    assert nearly_orthogonal(torch.randn(1, 4, 4, generator=seeded(0))).dtype == expected


def test_a_gradient_of_zeros_moves_nothing():
    parameters, optimizer = both()
    held = [weight.clone() for weight in parameters]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(weight, kept) for weight, kept in zip(parameters, held, strict=True))


def test_a_weight_without_a_gradient_stays():
    parameters, optimizer = both()
    held = parameters[0].clone()
    move(optimizer, parameters[1:], 0)
    assert torch.equal(parameters[0], held)
    assert parameters[0] not in optimizer.state


class Watched(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def ran_in_a_step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> list[str]:
    move(optimizer, parameters, 0)
    with Watched() as watched:
        optimizer.step()
    return watched.ran


def test_a_step_reads_no_number_of_the_device():
    """So that it can be captured; that of PyTorch's Muon reads its rate."""
    parameters, optimizer = both()
    optimizer.found_inf = torch.zeros(())
    assert "_local_scalar_dense" not in ran_in_a_step(optimizer, parameters)
    matrices = parameters_of(MATRICES)
    assert "_local_scalar_dense" in ran_in_a_step(torch.optim.Muon(matrices, lr=torch.tensor(0.02)), matrices)


def test_weights_of_one_shape_share_their_products():
    counts = []
    for number in (1, 8):
        matrices = parameters_of(((6, 4),) * number)
        ran = ran_in_a_step(Muon(matrices), matrices)
        counts.append(len([name for name in ran if name in ("bmm", "baddbmm")]))
    assert counts == [15, 15]


def test_a_rate_may_live_on_the_device():
    ours, theirs = parameters_of(MATRICES), parameters_of(MATRICES)
    for parameters, rate in ((ours, torch.tensor(0.02)), (theirs, 0.02)):
        move(Muon(parameters, lr=rate), parameters, 0)
    for weight, expected in zip(ours, theirs, strict=True):
        assert_close(weight, expected, SAME_GRAPH)


def test_a_step_whose_gradient_is_not_finite_changes_nothing():
    parameters, optimizer = both()
    move(optimizer, parameters, 0)
    held = [weight.clone() for weight in parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for weight in parameters:
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(weight, kept) for weight, kept in zip(parameters, held, strict=True))
    for place, tensors in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[place][name]) for name, tensor in tensors.items())
    optimizer.found_inf = torch.zeros(())
    move(optimizer, parameters, 1)
    assert not any(torch.equal(weight, kept) for weight, kept in zip(parameters, held, strict=True))


def test_a_loaded_state_goes_on_where_it_was():
    (through, optimizer), (stopped, before) = both(), both()
    for step in range(4):
        move(optimizer, through, step)
    for step in range(2):
        move(before, stopped, step)
    after = Muon(groups_of(stopped[: len(MATRICES)], stopped[len(MATRICES) :]))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for step in range(2, 4):
        move(after, stopped, step)
    assert all(torch.equal(weight, expected) for weight, expected in zip(stopped, through, strict=True))
    assert all(tensor.device.type == DEVICE for state in after.state.values() for tensor in state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_an_optimiser_moves_its_own_weights_alike(copied):
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=seeded(0)))
    optimizer = Muon([weight], lr=0.1, dtype=torch.bfloat16)
    move(optimizer, [weight], 0)
    again = copied(optimizer)
    (its,) = again.param_groups[0]["params"]
    assert its is not weight
    for one, parameter in ((optimizer, weight), (again, its)):
        move(one, [parameter], 1)
    assert torch.equal(its, weight)


def test_the_matrices_of_layers_move_orthogonally_and_nothing_else():
    model = MemorizingTransformer(
        num_tokens=256, dim=32, depth=2, dim_head=8, heads=4, memorizing_layers=2, combine="gate", sink=True
    )
    optimizer = make_optimizer(model, Settings(optimizer="muon", weight_decay=0.3))
    assert isinstance(optimizer, Muon)
    found = {name for name, weight in model.named_parameters() if optimizer.moves_orthogonally(weight)}
    ends = ("to_q.weight", "to_kv.weight", "to_out.weight", "net.0.weight", "net.3.weight")
    assert found == {name for name, _ in model.named_parameters() if name.endswith(ends)}
    assert len(found) == 10
    everything = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in everything} == {id(weight) for weight in model.parameters()}
    assert len(everything) == len(list(model.parameters()))
    decayed = {id(weight) for group in optimizer.param_groups if group["weight_decay"] for weight in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in decayed}
    assert names == found | {"to_logits.1.weight"}


def test_a_linear_layer_that_shares_the_embeddings_is_adamws():
    model = MemorizingTransformer(num_tokens=256, dim=32, depth=1, dim_head=8, heads=4, memorizing_layers=())
    model.to_logits[1].weight = model.token_emb.weight
    optimizer = make_optimizer(model, Settings(optimizer="muon"))
    assert not optimizer.moves_orthogonally(model.token_emb.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr, weight_decay and eps must be at least 0, got -1\.0, 0\.0"),
        ({"lr": float("nan")}, r"lr, weight_decay and eps must be at least 0, got nan"),
        ({"weight_decay": -0.5}, r"lr, weight_decay and eps must be at least 0, got 0\.001, -0\.5"),
        ({"momentum": 1.0}, r"momentum and betas must be in \[0, 1\), got 1\.0"),
        ({"betas": (0.9, -0.1)}, r"momentum and betas must be in \[0, 1\), got 0\.95 and \(0\.9, -0\.1\)"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters_of(MATRICES), **options)


def test_an_orthogonal_step_for_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"params must be matrices where steps are orthogonal, got \(4, 1, 1\)"):
        Muon(parameters_of(((2, 3), (4, 1, 1))))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_weight_that_is_spread_over_ranks_is_refused(orthogonal):
    weight = parameters_of(MATRICES)[0]
    weight.full_tensor = lambda: weight  # as a DTensor has
    with pytest.raises(ValueError, match="params must have all of their numbers on this rank, got a weight"):
        Muon([weight], orthogonal=orthogonal)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure must be None"):
        Muon(parameters_of(MATRICES)).step(lambda: 0.0)


def test_steps_are_counted_in_float32_whatever_the_default_is():
    """bfloat16 counts to 256 and stays there."""
    parameters = parameters_of(OTHERS)
    with default_dtype(torch.bfloat16):
        optimizer = Muon(groups_of([], parameters))
        for seed in range(260):
            move(optimizer, parameters, seed)
    assert optimizer.state[parameters[0]]["step"].item() == 260
