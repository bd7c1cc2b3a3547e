"""The weight's gradient added to memory that the caller keeps: `main_grad`.

T tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import entropy_kernels as ek
from entropy_kernels import _native
from entropy_kernels.testing import Watch, peaked_head
from tests.head_cases import BY_TRITON, DTYPES, logprob_entropy, make
from tests.marks import nan_is_meant

SHAPE = T, D, V = 33, 16, 1031


def loss_of(head, h, w, y, rows=20, **options):
    found = head(h, w, y, **options)
    return (found.logprob - 0.3 * found.entropy)[:rows].sum()


def leaves(dtype=torch.float32, device="cpu", shape=SHAPE):
    h, w, y = make("peaked", shape, dtype, device)
    return h.requires_grad_(), w.requires_grad_(), y


@pytest.fixture
def shape(block):
    """Its last block of the vocabulary is not whole."""
    return T, D, block[1] + 7


def ordinary(head, h, w, y, **options):
    """(hidden's gradient, the weight's) by way of autograd; the leaves have none afterwards."""
    loss_of(head, h, w, y, **options).backward()
    found = h.grad, w.grad
    h.grad = w.grad = None
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_become_the_ordinary_gradient_to_the_bit(head, dtype, device, shape):
    h, w, y = leaves(dtype, device, shape)
    dh, dw = ordinary(head, h, w, y)
    main_grad = torch.zeros_like(w)
    loss_of(head, h, w, y, main_grad=main_grad).backward()
    assert w.grad is None
    assert torch.equal(h.grad, dh)
    if device == "cuda" and dtype != torch.float32:
        # cuBLAS may take another kernel for a product in fp32 than for one in 16 bits.
        torch.testing.assert_close(main_grad, dw, rtol=torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert torch.equal(main_grad, dw)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_specification_does_so_too(dtype):
    head = functools.partial(logprob_entropy, impl="reference")
    h, w, y = leaves(dtype)
    dh, dw = ordinary(head, h, w, y)
    for buffer in {dtype, torch.float32}:
        main_grad = torch.zeros_like(w, dtype=buffer)
        loss = loss_of(head, h, w, y, main_grad=main_grad)
        loss.backward(retain_graph=True)
        assert w.grad is None
        assert torch.equal(h.grad, dh)
        h.grad = None
        assert torch.equal(main_grad.to(dw.dtype), dw) or dtype == torch.float64 != buffer
        once = main_grad.clone()
        loss.backward()
        torch.testing.assert_close(main_grad, 2 * once)
        h.grad = None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_fp32_sum_of_16_bit_gradients_is_never_rounded_to_16_bits(head, device, dtype, shape):
    """Rounded at last it is the ordinary gradient; what is small is not lost in what is large."""
    h, w, y = leaves(dtype, device, shape)
    _, dw = ordinary(head, h, w, y)
    main_grad = torch.zeros_like(w, dtype=torch.float32)
    loss_of(head, h, w, y, main_grad=main_grad).backward()
    if device == "cpu":
        assert torch.equal(main_grad.to(dtype), dw)
    added = main_grad.clone()
    sums = torch.full_like(added, 64.0)
    loss_of(head, h, w, y, main_grad=sums).backward()
    torch.testing.assert_close(sums - 64, added, rtol=0, atol=2.0**-17)

    truth = [x.detach().double().requires_grad_() for x in (h, w)]
    loss_of(functools.partial(logprob_entropy, impl="reference"), *truth, y).backward()
    error = (added.double() - truth[1].grad).norm()
    if head.keywords["impl"] == "torch" and device == "cpu":
        assert error < 2e-6 * truth[1].grad.norm()
    else:  # dz itself has 16 bits there
        assert error < (dw.double() - truth[1].grad).norm()


@pytest.mark.parametrize("buffer", DTYPES, ids=str)
def test_a_buffer_is_added_to_and_rounded_once(head, device, buffer, shape):
    h, w, y = leaves(buffer, device, shape)
    exact = torch.zeros_like(w, dtype=torch.float32)
    loss_of(head, h, w, y, main_grad=exact).backward()
    before = torch.randn(w.shape, device=device).to(buffer)
    main_grad = before.clone()
    loss_of(head, h, w, y, main_grad=main_grad).backward()
    assert torch.equal(main_grad, (before.float() + exact).to(buffer))


def test_weight_grad_stays_where_it_is_over_steps(head, device, shape):
    """None at the first step is no option; then the memory is that of the first gradient."""
    h, w, y = leaves(torch.float32, device, shape)
    optimizer = torch.optim.SGD([w], lr=0.1)
    wanted = w.detach().clone().requires_grad_()
    reference_optimizer = torch.optim.SGD([wanted], lr=0.1)
    places = set()
    for _ in range(3):
        loss_of(head, h, w, y, main_grad=w.grad).backward()
        loss_of(head, h, wanted, y).backward()
        assert torch.equal(w.grad, wanted.grad)
        places.add(w.grad.data_ptr())
        optimizer.step()
        reference_optimizer.step()
        assert torch.equal(w, wanted)
        optimizer.zero_grad(set_to_none=False)
        reference_optimizer.zero_grad()
    assert len(places) == 1


def embedded(w, ids):
    """Another use of the weight, with a gradient of its own."""
    return (torch.nn.functional.embedding(ids, w) ** 2).sum()


@pytest.mark.parametrize("order", ["head first", "embedding first", "one backward", "tied"])
def test_a_tied_embedding_adds_its_own(head, device, order, shape):
    h, w, y = leaves(torch.float32, device, shape)
    ids = torch.arange(0, len(w), 3, device=device)
    alone = torch.autograd.grad(embedded(w, ids), w)[0]
    _, dw = ordinary(head, h, w, y)
    w.grad = torch.zeros_like(w)
    place = w.grad.data_ptr()
    if order == "tied":
        # The embedding gives the hidden states, so that its gradient arrives last.
        h = torch.nn.functional.embedding(y, w)
        wanted = w.detach().clone().requires_grad_()
        loss_of(head, torch.nn.functional.embedding(y, wanted), wanted, y).backward()
        loss_of(head, h, w, y, main_grad=w.grad).backward()
        total = wanted.grad
    else:
        total = alone + dw
        uses = [
            lambda: loss_of(head, h, w, y, main_grad=w.grad),
            lambda: embedded(w, ids),
        ]
        if order == "one backward":
            sum(use() for use in uses).backward()
            w.grad.zero_()
            sum(use() for use in reversed(uses)).backward()
        else:
            for use in uses if order == "head first" else reversed(uses):
                use().backward()
    assert w.grad.data_ptr() == place
    torch.testing.assert_close(w.grad, total, rtol=1e-5, atol=1e-6)


def test_each_backward_through_a_graph_adds_again(head, device, shape):
    """Also one that asks for the hidden states' gradient alone."""
    h, w, y = leaves(torch.float32, device, shape)
    _, dw = ordinary(head, h, w, y)
    main_grad = torch.zeros_like(w)
    loss = loss_of(head, h, w, y, main_grad=main_grad)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, h, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(main_grad, 3 * dw, rtol=1e-5, atol=1e-6)


def test_no_active_row_leaves_every_bit(head, device, shape):
    h, w, y = leaves(torch.float32, device, shape)
    main_grad = torch.full_like(w, -0.0)
    loss_of(head, h, w, torch.full_like(y, -100), main_grad=main_grad).backward()
    assert main_grad.signbit().all()
    assert (main_grad == 0).all()


@nan_is_meant
def test_a_nan_arrives(head, device, shape):
    h, w, y = leaves(torch.float32, device, shape)
    main_grad = torch.zeros_like(w)
    (loss_of(head, h, w, y, main_grad=main_grad) * torch.nan).backward()
    assert main_grad.isnan().all()


def test_hooks_of_the_weight_see_no_gradient(head, device, shape):
    h, w, y = leaves(torch.float32, device, shape)
    seen = []
    w.register_hook(seen.append)
    loss_of(head, h, w, y, main_grad=torch.zeros_like(w)).backward()
    assert seen == [None]


def test_a_backward_allocates_no_gradient_of_the_weight(head, impl, device, block, monkeypatch):
    dtype, most = torch.float32, 0.2
    if impl in BY_TRITON:
        from entropy_kernels._triton.head_backward import launch as backward

        monkeypatch.setattr(backward, "CHUNK_V", block[1])
        monkeypatch.setattr(backward, "DZ_BYTES", 0)
        monkeypatch.setattr(backward, "STAGING_BYTES", 4 * 16 * block[1])
        # The interpreter copies the weight, of half the size.
        dtype, most = torch.bfloat16, 0.5
    h, w, y = leaves(dtype, device, (9, 16, 8 * block[1]))
    main_grad = torch.zeros_like(w, dtype=torch.float32)
    loss = loss_of(head, h, w, y, main_grad=main_grad)
    with Watch() as watch:
        loss.backward()
    assert watch.largest <= most * main_grad.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_a_fp32_weight_s_sum_is_not_rounded(head, device, dtype, shape):
    h, w, y = leaves(torch.float32, device, shape)
    main_grad, cast = torch.zeros_like(w), torch.zeros_like(w)
    with torch.autocast(device, dtype=dtype):
        loss = loss_of(head, h, w, y, main_grad=main_grad)
    loss.backward()
    low = [x.detach().to(dtype).requires_grad_() for x in (h, w)]
    loss_of(head, *low, y, main_grad=cast).backward()
    assert torch.equal(main_grad, cast)
    assert not torch.equal(main_grad, main_grad.to(dtype).float())


@pytest.mark.parametrize("way", ["fraction", "threshold", "selected", "module"])
def test_the_losses_hand_it_on(impl, device, way, shape):
    h, w, y = leaves(torch.float32, device, shape)
    given = {
        "old_logprob": None,
        "advantage": torch.randn(T, device=device),
        "mask": torch.ones(T, dtype=torch.bool, device=device),
    }
    options = {
        "threshold": {"threshold": 0.5},
        "selected": {"selected": torch.arange(T, device=device) % 3 == 0},
    }.get(way, {"fraction": 0.4})
    module = ek.HighEntropyPolicyLoss(fraction=0.4, backend=ek.Backend(impl))

    def loss(**main_grad):
        head = ek.Head(h, w, y)
        if way == "module":
            return module(head, **given, **main_grad)[0]
        backend = ek.Backend(impl, **main_grad)
        return ek.high_entropy_policy_loss(head, **given, **options, backend=backend)[0]

    loss().backward()
    want, w.grad = w.grad, None
    main_grad = torch.zeros_like(w)
    loss(main_grad=main_grad).backward()
    assert w.grad is None
    assert torch.equal(main_grad, want)


def test_it_compiles_into_one_graph(head, device, unchecked_shapes):
    """A buffer that is an argument, and the weight's own."""
    h, w, y = leaves(torch.float32, device, (9, 8, 67))
    dh, dw = ordinary(head, h, w, y)

    def step(h, w, main_grad):
        return loss_of(head, h, w, y, main_grad=main_grad)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    main_grad = torch.ones_like(w)
    compiled(h, w, main_grad).backward()
    assert w.grad is None
    torch.testing.assert_close(h.grad, dh, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(main_grad - 1, dw, rtol=1e-5, atol=1e-6)
    own = torch.compile(lambda h, w: step(h, w, w.grad), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        own(h, w).backward()
    torch.testing.assert_close(w.grad, 3 * dw, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(_native.why_missing("cpu") is not None, reason="the kernels are not built")
@pytest.mark.parametrize("buffer", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_adds_after_its_last_chunk_of_rows(dtype, buffer):
    """600 active rows are two chunks; D and V leave tails. Any buffer for any head."""
    h, w, y = peaked_head(600, 33, 99, dtype=dtype)
    grads = [torch.randn(600), torch.randn(600), None]
    before = torch.randn(99, 33).to(buffer)
    for isa in _native.cpu().instruction_sets():
        head = ek.Head(h, w, y, temperature=None)
        found = _native.forward(head, keep_logits=False, isa=isa)
        added = torch.zeros(99, 33)
        given = (tuple(grads), head, found, (False, True, False))
        for main_grad in (added, total := before.clone()):
            _, dweight, _ = _native.backward(*given, isa=isa, main_grad=main_grad)
            assert dweight is None
        _, dweight, _ = _native.backward(*given, isa=isa)
        assert torch.equal(added.to(dtype), dweight)
        assert torch.equal(total, (before.float() + added).to(buffer))


class Model(torch.nn.Module):
    """A head, and what gives its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 67, bias=False)

    def forward(self, x, y, main_grad):
        return loss_of(logprob_entropy, self.body(x), self.head.weight, y, main_grad=main_grad)


def averaged(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        found = []
        for keep in (False, True):
            torch.manual_seed(0)
            model = Model()
            ddp = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            generator = torch.Generator().manual_seed(rank)
            for _ in range(3):
                optimizer.zero_grad(set_to_none=False)
                for synchronises in (False, True):
                    x = torch.randn(9, 8, generator=generator)
                    y = torch.randint(67, (9,), generator=generator)
                    ddp.require_backward_grad_sync = synchronises
                    ddp(x, y, model.head.weight.grad if keep else None).backward()
                optimizer.step()
            found.append(model.head.weight.grad)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_averages_weight_grad_whoever_has_written_it(tmp_path):
    spawn(averaged, (str(tmp_path),), nprocs=2)
    (ordinary_0, kept_0), (_, kept_1) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert torch.equal(kept_0, kept_1)
    torch.testing.assert_close(kept_0, ordinary_0, rtol=1e-6, atol=1e-7)
