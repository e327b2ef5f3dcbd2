"""Every spelling of a CUDA device means main memory, and stays truthful about it."""

import io
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemo_opt import device

device.activate(announce=False)

SPELLINGS = ["cuda", "cuda:0", "cuda:3", 0, torch.device("cuda"), torch.device("cuda", 1)]


@pytest.mark.parametrize("where", SPELLINGS, ids=str)
def test_factories_and_methods_take_every_spelling(where):
    made = [
        torch.zeros(2, device=where),
        torch.tensor([1.0, 2.0], device=where),
        torch.empty_like(torch.ones(2), device=where),
        torch.ones(2).to(where),
        torch.ones(2).to(device=where, dtype=torch.float64),
        torch.ones(2).to(where, torch.float16, non_blocking=True),
        torch.ones(2).cuda(),
        torch.ones(2).new_zeros(2, device=where),
        torch.arange(2, device=where, pin_memory=True),
        torch.nn.Linear(2, 2, device=where).weight,
        torch.nn.Linear(2, 2).to(where).weight,
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    for tensor in made:
        assert tensor.device == torch.device("cpu")
        assert not tensor.is_cuda


def test_every_wrapped_factory_still_makes_what_it_made():
    torch.manual_seed(0)
    expected = torch.randn(3, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3, dtype=torch.float64, device="cuda"), expected)
    assert torch.equal(torch.full((2, 2), 7, device=0), torch.tensor([[7, 7], [7, 7]]))
    assert torch.equal(torch.linspace(0, 1, 3, device="cuda"), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(torch.eye(2, device="cuda:0"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(torch.asarray([1, 2], device="cuda"), torch.tensor([1, 2]))


def test_other_devices_and_arguments_pass_through():
    assert torch.empty(2, device="meta").is_meta
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.zeros(1, dtype=torch.int32)).dtype == torch.int32
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_default_devices_are_redirected():
    with torch.device("cuda"):
        assert torch.zeros(2).device.type == "cpu"
    torch.set_default_device("cuda")
    try:
        assert torch.ones(2).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_type_names_tell_the_truth_and_cuda_names_are_understood():
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.cuda.FloatTensor([1.0, 2.0]).tolist() == [1.0, 2.0]
    assert isinstance(torch.ones(1), torch.cuda.FloatTensor)


def test_memory_calls_of_a_tensor_keep_it():
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.pin_memory() is tensor
    tensor.record_stream(torch.cuda.current_stream())
    assert tensor.untyped_storage().cuda().data_ptr() == tensor.data_ptr()


def test_what_was_saved_on_a_gpu_loads_into_main_memory(monkeypatch):
    file = io.BytesIO()
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save({"x": torch.arange(3)}, file)
    for map_location in (None, "cuda", "cuda:0", torch.device("cuda", 1), "cpu", {"cuda:1": "cuda:0"}):
        file.seek(0)
        loaded = torch.load(file, map_location=map_location, weights_only=True)["x"]
        assert loaded.tolist() == [0, 1, 2]
        assert loaded.device.type == "cpu"


def test_generators_are_real_ones():
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.default_generator, torch.Generator)
    assert not isinstance(3, torch.Generator)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(2, generator=generator, device="cuda"), expected)


class _MakesTensorsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full((1,), 2.0, device=torch.cuda.current_device())


@pytest.mark.parametrize("thread", [False, True])
def test_redirect_holds_in_backward_in_recomputation_and_in_threads(thread):
    x = torch.ones(2, requires_grad=True)

    def run():
        checkpoint(lambda x: _MakesTensorsBackward.apply(x) * torch.ones(2, device=0), x, use_reentrant=True).sum().backward()

    if thread:
        worker = threading.Thread(target=run)
        worker.start()
        worker.join(timeout=30)
    else:
        run()
    assert x.grad.tolist() == [2.0, 2.0]


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")  # which GPU programs still use
def test_autocast_is_seen_by_those_who_ask():
    assert not torch.is_autocast_enabled()
    with torch.cuda.amp.autocast(dtype=torch.bfloat16):
        assert torch.is_autocast_enabled()
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.get_autocast_gpu_dtype() == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_compiled_functions_reach_main_memory():
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + torch.ones(2, device="cuda") * torch.full((2,), 2.0, device=torch.device("cuda", 0))

    assert compiled(torch.zeros(2)).tolist() == [2.0, 2.0]


def test_autocast_of_cuda_is_autocast_of_what_computes():
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.autocast("cuda"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cuda"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    with torch.autocast("cuda", enabled=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_wrapped_factories_can_be_scripted():
    @torch.jit.script
    def scripted(n: int):
        return torch.zeros(n, dtype=torch.float32) + torch.ones(n)

    assert scripted(3).tolist() == [1.0, 1.0, 1.0]


def test_factories_under_torch_function_modes_keep_their_identity():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.zeros(2, device="cuda").to("cuda")
    assert "zeros" in seen
    assert "to" in seen
