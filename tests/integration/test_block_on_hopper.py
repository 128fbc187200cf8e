"""A block of `wan_1_3b` at 480p x 81 frames as the code generator has it for Hopper, without a GPU: budgets of what it
keeps for backward, of kernels and of memory traffic. The step's time hangs on them.

It is traced on fake CPU tensors, since autograd takes no fake CUDA tensors without a device, with cuDNN's attention in
the core, and its graphs are then lowered for fake CUDA tensors of compute capability 9.0. Lowering takes the package
triton, which CPU builds of torch do not bring (`pip install triton`); nothing is compiled by it or run.
"""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_train.config.compose import compose
from sora_train.models.transformer import attention, layers
from sora_train.models.transformer.dit import Block

pytestmark = pytest.mark.slow
FRAMES, TOKENS, CAPTION = 21, 1560, 512
"""Latent frames, tokens of each, tokens of the caption: 32,760 tokens."""
SAVED_GB = 3.4
KERNELS = 60
TRAFFIC_GB = 14.0
"""Budgets; docs/log.md has what was found."""
HOPPER = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20,
    gcnArchName="",
    is_integrated=0,
)

Graphs = dict[str, tuple[fx.GraphModule, list[Any]]]


def cudnn_attention(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]
    return found.transpose(1, 2)


def trace() -> Graphs:
    """The graphs of forward and backward that the compiler's partitioner makes, and their inputs."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table

    graphs: Graphs = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            graphs[name] = (graph, inputs)
            return graph.forward

        return compiler

    cfg = compose(["experiment=parity_tiny", "model=wan_1_3b"]).config.model
    with FakeTensorMode(allow_non_fake_inputs=True):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        block = Block(cfg)
        torch.set_default_dtype(default)
        names = [name for name, _ in block.named_parameters()]

        def forward(params: list[Tensor], *inputs: Tensor) -> Tensor:
            named = dict(zip(names, params, strict=True))
            return torch.func.functional_call(block, named, (*inputs, None))

        traced = aot_function(
            forward,
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        x = torch.empty(1, FRAMES, TOKENS, cfg.dim, requires_grad=True)
        captions = torch.empty(1, CAPTION, cfg.dim, dtype=torch.bfloat16, requires_grad=True)
        modulation = torch.empty(1, FRAMES, 6, cfg.dim, requires_grad=True)
        table = torch.empty(2, FRAMES, TOKENS, 1, cfg.head_dim // 2)
        traced(list(block.parameters()), x, captions, modulation, table).sum().backward()
    return graphs


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", cudnn_attention)
        # As on a GPU: products in bfloat16, and no code of the CPU's own.
        patch.setattr(layers, "multiplied_wide", lambda x: False)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return trace()


def test_a_block_keeps_no_more_for_backward_than_its_budget(graphs: Graphs):
    graph, _ = graphs["forward"]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    given = {node for node in graph.graph.nodes if node.op == "placeholder"}
    kept = [node.meta["val"] for node in output.args[0][1:] if node not in given]
    sizes = [x.numel() * x.element_size() for x in kept if isinstance(x, Tensor)]
    saved = sum(sizes) / 1e9
    print(f"saved for backward: {saved:.3f} GB in {len(sizes)} tensors")
    # The output of attention and the MLP's inner width are products, which are not computed again.
    assert 1.0 < saved <= SAVED_GB


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="code for a GPU needs the package triton"
)
def test_a_block_is_lowered_to_no_more_kernels_and_traffic_than_its_budgets(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
):
    pretend_hopper(monkeypatch)
    counts = [lower(*graphs[name], backward=name == "backward") for name in graphs]
    kernels, traffic = sum(n for n, _ in counts), sum(b for _, b in counts)
    print(f"kernels of forward and backward: {counts}; {traffic / 1e9:.2f} GB")
    assert 20 < kernels <= KERNELS
    assert 5e9 < traffic <= TRAFFIC_GB * 1e9


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code generator see one H200."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.codecache as codecache
    import torch._inductor.scheduler as scheduler
    import torch._inductor.utils as inductor
    import triton
    from triton.backends.compiler import GPUTarget

    answers = {
        "get_device_properties": HOPPER,
        "get_device_capability": (9, 0),
        "get_device_name": HOPPER.name,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    cuda = interfaces.CudaInterface
    fixed = {
        (cuda.Worker, "get_device_properties"): HOPPER,
        (cuda.Worker, "current_device"): 0,
        (cuda, "get_device_properties"): HOPPER,
        (cuda, "current_device"): 0,
        (cuda, "device_count"): 1,
        (cuda, "get_compute_capability"): 90,
        (cuda, "is_available"): True,
    }
    for (owner, name), answer in fixed.items():
        monkeypatch.setattr(owner, name, staticmethod(lambda *a, answer=answer, **k: answer))

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *device: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_interface(self) -> Any:
            return torch.cuda

        @staticmethod
        def is_active() -> bool:
            return True

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    monkeypatch.setattr(scheduler, "has_triton", lambda *a, **k: True)
    monkeypatch.setattr(inductor, "is_big_gpu", lambda *a, **k: True)
    # The code is written and not loaded.
    loaded = classmethod(lambda cls, *a, **k: SimpleNamespace())
    monkeypatch.setattr(codecache.PyCodeCache, "load_by_key_path", loaded)


def lower(graph: fx.GraphModule, inputs: list[Any], *, backward: bool) -> tuple[int, float]:
    """Kernels that the code generator writes for a graph, and bytes that they read and write."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in inputs
        ]
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with torch.no_grad(), V.set_fake_mode(mode):
        FakeTensorProp(graph, mode).propagate(*moved)
        view_to_reshape(graph)
        _recursive_post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate(*moved)
        lowering = GraphLowering(
            graph, example_inputs=moved, is_backward=backward, is_inference=False
        )
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering):
            lowering.run(*moved)
            lowering.codegen()
            # Written by the code generator: no matrix product, attention core or buffer alone.
            nodes = [
                node
                for node in lowering.scheduler.nodes
                if not node.is_extern() and not isinstance(node, NopKernelSchedulerNode)
            ]
            return len(nodes), sum(node.get_read_write_buffers_sizes() for node in nodes)
