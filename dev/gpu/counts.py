#!/usr/bin/env python
"""Count what inference and a training step ask of a GPU, on the pretended one of the tests.

R-50, one image, 20 objects in training. `waits` of the host, `launches` of kernels and copies,
`copies` to the GPU for which the host does not wait; `GB` that operations read and write, each from
memory; `GFLOP` of matrix products and convolutions, two per multiplication.

Usage: python dev/gpu/counts.py [HEIGHT WIDTH [KEY VALUE ...]]
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]
from pretended_cuda import pretend  # noqa: E402

import tensormask  # noqa: E402
from tensormask.commands.benchmark import seeded_model, training_step  # noqa: E402
from tensormask.commands.synthetic import make_image, make_target, make_up_scores  # noqa: E402


def main(arguments: list[str]) -> None:
    size = (int(arguments[0]), int(arguments[1])) if arguments else (800, 1344)
    torch.set_num_threads(1)
    with pretend() as record:
        cfg = tensormask.get_cfg()
        cfg.merge_from_file(str(_ROOT / "configs/tensormask_R_50_FPN_1x.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "cuda", *arguments[2:]])
        model = seeded_model(cfg)
        make_up_scores(model)
        image = make_image(size).pin_memory()

        def detect() -> None:
            with torch.no_grad():
                (result,) = model([image])
            for value in result.values():
                value.cpu()

        step = training_step(cfg, model)
        target = {k: v.pin_memory() for k, v in make_target(size, 20, 80).items()}
        samples = [{"image": image, "target": target, "file_name": "seeded"}]
        for name, call in (("inference", detect), ("training", lambda: step(samples))):
            model.train(name == "training")
            call()  # copies constants
            record.clear()
            with FlopCounterMode(display=False) as flops:
                call()
            print(
                f"{name}: {record.waits.total()} waits, {record.launches.total()} launches, "
                f"{record.pinned.total()} copies, {record.num_bytes / 1e9:.1f} GB, "
                f"{flops.get_total_flops() / 1e9:.0f} GFLOP, {record.mixes.total()} mixes"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
