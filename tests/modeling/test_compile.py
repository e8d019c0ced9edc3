"""MODEL.COMPILE: what is compiled, and that every input size is."""

import pytest
import tiny
import torch
from torch._dynamo import config as dynamo_config
from torch.testing import assert_close

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


@pytest.mark.parametrize("norm", ["FrozenBN", pytest.param("GN", marks=pytest.mark.slow)])
def test_the_dense_part_is_one_graph(norm: str) -> None:
    """At two padded sizes, in training and inference: no graph break, equal results and gradients.

    CUDA graphs need one graph; they were never captured.
    """
    torch._dynamo.reset()
    model = tiny.build(opts=["MODEL.RESNETS.NORM", norm, "MODEL.SIZE_DIVISOR", 128])
    compiled = torch.compile(dense_of(model), fullgraph=True, dynamic=False, backend="eager")
    for height, width in (100, 60), (130, 128):
        batch = model.preprocess([tiny.make_image(height, width)])
        assert batch.shape[2] % 128 == batch.shape[3] % 128 == 0
        for training in (True, False):
            model.train(training)
            results = []
            for function in (dense_of(model), compiled):
                model.zero_grad()
                features, logits, deltas = function(batch)
                sum(x.square().sum() for x in (*features, *logits, *deltas)).backward()
                grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                results.append([features, logits, deltas, grads])
            assert_close(*results, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def dense_of(model):
    """Return the function from a padded batch to features, logits and deltas of `model.dense`."""

    def dense(batch: torch.Tensor):
        features = model.fpn(model.backbone(batch))
        return features, *model.head(features)

    return dense
