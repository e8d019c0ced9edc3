"""MODEL.COMPILE: what is compiled, and that every input size is."""

import tiny
import torch
from torch._dynamo import config as dynamo_config

from tensormask.modeling.build import compile_dense_parts


def test_the_dense_parts_are_compiled(monkeypatch) -> None:
    """The arguments of the compiler; it does not run."""
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compiled.append((call, options)) or call
    )
    model = tiny.build(opts=["MODEL.COMPILE", "reduce-overhead"])
    assert [call.__self__ for call, _ in compiled] == [model.backbone, model.fpn, model.head]
    assert {options["mode"] for _, options in compiled} == {"reduce-overhead"}
    compiled.clear()
    tiny.build()
    assert compiled == []


def test_every_input_size_is_compiled() -> None:
    """PyTorch's limits apply to other code: they are the same before, between and after calls."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    limits = {"recompile_limit": 1, "accumulated_recompile_limit": 2}
    with dynamo_config.patch(limits), torch.inference_mode():
        model = tiny.build().eval()
        compile_dense_parts(model, "default", backend)
        for number, side in enumerate((32, 64, 96), start=1):
            dense = model.dense([tiny.make_image(32, side)])
            assert dense.deltas is not None  # a compiled head computes those of all windows
            assert len(graphs) == 3 * number  # backbone, pyramid, head
            assert {name: getattr(dynamo_config, name) for name in limits} == limits
        model.dense([tiny.make_image(32, 64)])
        assert len(graphs) == 3 * 3
    torch._dynamo.reset()
