"""Communication and the division of work between ranks; whole runs in test_distributed_runs.py."""

import itertools
import re
import time
from datetime import timedelta

import fork
import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import make_cfg as make_fake_cfg
from grey import CATEGORY_IDS, FakeModel, GreyDataset, coco_json, detections, noisy_case, rectangle
from run_folders import content
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tensormask.config import get_cfg
from tensormask.data import build_test_loader, build_train_loader, get_dataset
from tensormask.data.shapes import write_split
from tensormask.engine import distributed, evaluator, launch
from tensormask.engine.distributed import scale_to_world_size
from tensormask.evaluation import coco_results, evaluate, results_table
from tensormask.evaluation.results import ResultsWriter, detections_of, merge_results
from tensormask.modeling.criterion import foreground_normalizer

# ---- a single process ----


def test_a_single_process_changes_nothing():
    model, tensor = nn.Linear(2, 2), torch.ones(2)
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert distributed.is_main_process()
    assert distributed.wrap(model) is model is distributed.unwrap(model)
    assert distributed.all_reduce_sum(tensor) is tensor is distributed.mean_over_ranks(tensor)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.gather_lists([1, 2]) == [1, 2]
    assert distributed.gather_lists([]) == []
    assert distributed.broadcast_object("a") == "a"
    assert [distributed.any_rank(flag) for flag in (True, False)] == [True, False]
    distributed.barrier()
    distributed.check_same("thing", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "gather_objects", lambda value: [value, 2])
        with pytest.raises(ValueError, match="rank 1 has another thing than rank 0"):
            distributed.check_same("thing", 1)
    with distributed.first_on_machine():
        pass
    assert distributed.rank_prefix() == ""
    assert [foreground_normalizer(n, torch.device("cpu")) for n in (0, 7)] == [1, 7]


# ---- a group of one process ----


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_in_a_group(group):
    tensor = torch.ones(2)
    total = distributed.all_reduce_sum(tensor)
    assert total is not tensor
    assert total.tolist() == distributed.mean_over_ranks(tensor).tolist() == [1, 1]
    assert distributed.gather_objects({"a": (1, "b")}) == [{"a": (1, "b")}]
    assert distributed.gather_lists([("a", 1)]) == [("a", 1)]
    assert distributed.gather_lists([]) == []
    assert distributed.broadcast_object(["a"]) == ["a"]
    assert [distributed.any_rank(flag) for flag in (True, False)] == [True, False]
    distributed.barrier()
    total = distributed.all_reduce_sum
    counts = [foreground_normalizer(n, torch.device("cpu"), total) for n in (0, 7)]
    assert counts == [1, 7]


def test_wrapped_models(group):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = distributed.wrap(model)
    assert distributed.unwrap(wrapped) is model
    assert not wrapped.will_sync_module_buffers()
    wrapped(torch.rand(4, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"SyncBN works on GPUs only.*RESNETS\.NORM"):
        distributed.wrap(nn.Sequential(nn.Conv2d(1, 1, 1), nn.SyncBatchNorm(1)))
    with pytest.raises(ValueError, match="REDUCE_DTYPE must be '' or 'bfloat16', got 'float16'"):
        distributed.wrap(model, "float16")


# ---- a rank that works for longer than the limit of collectives ----


def test_ranks_wait_for_a_scoring_longer_than_the_timeout(fakes, tmp_path, monkeypatch, capfd):
    """Rank 0 scores for twice the limit of collectives between tensors."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))

    def evaluate(*args, rank, **options):
        time.sleep(2 * (rank == 0))
        return fakes.results if rank == 0 else {}

    monkeypatch.setattr(evaluator, "evaluate", evaluate)

    def run():
        distributed.start("cpu")
        cfg = make_fake_cfg(tmp_path)
        reporter = evaluator.build_issue_reporter(cfg, cfg.DATASETS.TEST)
        results = evaluator.evaluate_all(cfg, evaluator.build_model(cfg), tmp_path, reporter)
        distributed.stop()
        return int(results != fakes.results)

    assert fork.run_in_ranks(run) == [0, 0], capfd.readouterr().err


# ---- SOLVER.REFERENCE_WORLD_SIZE ----


def make_cfg(reference, **solver):
    cfg = get_cfg()
    cfg.merge_from_list([
        *("SOLVER.REFERENCE_WORLD_SIZE", reference, "SOLVER.IMS_PER_BATCH", 16),
        *("SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 90000, "SOLVER.STEPS", (60000, 80001)),
        *("SOLVER.WARMUP_ITERS", 1000, "SOLVER.CHECKPOINT_PERIOD", 5000, "TEST.EVAL_PERIOD", 3),
    ])  # fmt: skip
    cfg.merge_from_list([word for item in solver.items() for word in item])
    cfg.freeze()
    return cfg


@pytest.mark.parametrize(
    "world_size, expected",
    [
        (2, (4, 0.005, 360000, (240000, 320004), 4000, 20000, 12)),
        (32, (64, 0.08, 22500, (15000, 20000), 250, 1250, 1)),
        (12, (24, 0.03, 60000, (40000, 53334), 667, 3333, 2)),
    ],
)
def test_scaling_is_linear(monkeypatch, caplog, world_size, expected):
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    with caplog.at_level("INFO", logger="tensormask"):
        cfg = scale_to_world_size(make_cfg(8))
    solver = cfg.SOLVER
    assert (
        *(solver.IMS_PER_BATCH, pytest.approx(solver.BASE_LR), solver.MAX_ITER, solver.STEPS),
        *(solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
    ) == expected
    assert f"IMS_PER_BATCH {expected[0]}, BASE_LR {expected[1]}" in caplog.text
    assert solver.REFERENCE_WORLD_SIZE == world_size
    assert scale_to_world_size(cfg) is cfg  # as --resume reads it again


def test_scaling_that_changes_nothing(monkeypatch):
    for reference in (0, 1):
        cfg = make_cfg(reference)
        assert scale_to_world_size(cfg) is cfg
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    cfg = scale_to_world_size(make_cfg(8, **{"TEST.EVAL_PERIOD": 0}))
    assert cfg.TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize("reference", [-1, 3, 32])
def test_an_invalid_reference_is_refused(reference):
    with pytest.raises(ValueError, match="REFERENCE_WORLD_SIZE"):
        scale_to_world_size(make_cfg(reference))


# ---- batches ----


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_split("train", 10, folder)
    return f"{folder}/annotations.json@{folder}/images"


def loader_cfg(shapes, *opts):
    cfg = get_cfg()
    cfg.merge_from_list([
        *("DATASETS.TRAIN", (shapes,), "MODEL.TENSOR_MASK.NUM_CLASSES", 6, "SEED", 3),
        *("DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (40, 64), *opts),
        *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    ])  # fmt: skip
    return cfg


@pytest.mark.parametrize("world_size, num_parts", [(1, 3), (2, 1), (4, 1), (2, 2), (3, 2)])
def test_shares_are_the_batch(shapes, world_size, num_parts):
    """The ranks' shares of each part are the images, augmented, of a single process."""
    cfg = loader_cfg(shapes, "SOLVER.IMS_PER_BATCH", 12, "SOLVER.ACCUMULATE_STEPS", num_parts)
    whole = build_train_loader(cfg, 2)
    shares = [build_train_loader(cfg, 2, rank=r, world_size=world_size) for r in range(world_size)]
    size = 12 // (world_size * num_parts)
    for _ in range(2):
        batch, batches = next(whole), [next(share) for share in shares]
        parts = [share[n * size :][:size] for n in range(num_parts) for share in batches]
        for sample, expected in zip(itertools.chain(*parts), batch, strict=True):
            assert sample["file_name"] == expected["file_name"]
            assert torch.equal(sample["image"], expected["image"])
            assert torch.equal(sample["target"]["masks"], expected["target"]["masks"])


@pytest.mark.parametrize(
    "batch_size, world_size, num_parts, message",
    [(3, 2, 1, "set it to 4"), (6, 2, 2, "set it to 8"), (4, 1, 0, "1 or")],
)
def test_a_batch_must_be_divisible(shapes, batch_size, world_size, num_parts, message):
    opts = ("SOLVER.IMS_PER_BATCH", batch_size, "SOLVER.ACCUMULATE_STEPS", num_parts)
    with pytest.raises(ValueError, match=message):
        build_train_loader(loader_cfg(shapes, *opts), rank=0, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 3, 16])
def test_each_image_is_evaluated_once(shapes, world_size):
    cfg, dataset = loader_cfg(shapes), get_dataset(shapes)
    for rank in range(world_size):
        share = build_test_loader(cfg, dataset, rank=rank, world_size=world_size)
        assert [s["image_id"] for (s,) in share] == dataset.image_ids[rank::world_size]


# ---- evaluation ----


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_merged_files_equal_a_single_file(tmp_path, num_parts):
    ids = [5, "a", 2, 9, 1, "5"]  # of any order and type; 9 and "5" have no results
    per_image = {5: 2, "a": 1, 2: 3, 1: 1}
    results = {i: [{"image_id": i, "n": n} for n in range(per_image.get(i, 0))] for i in ids}
    one, merged = tmp_path / "one.json", tmp_path / "merged.json"
    parts = [tmp_path / f"part{number}" for number in range(num_parts)]
    for path, own_ids in [(one, ids), *((p, ids[r::num_parts]) for r, p in enumerate(parts))]:
        with ResultsWriter(path) as writer:
            for image_id in own_ids:
                writer.add(results[image_id])
    merge_results(parts, merged, ids)
    assert merged.read_bytes() == one.read_bytes()


def in_shares(model, dataset, folder, world_size, **options):
    """Return the results of `evaluate` by rank; the ranks run one after the other, rank 0 last."""
    samples, found, results = list(dataset.loader()), {}, {}
    for rank in reversed(range(world_size)):

        def gather(value, rank=rank):
            found[rank] = value
            return [found.get(each) for each in range(world_size)]

        share = samples[rank::world_size]
        results[rank] = evaluate(model, share, dataset, folder, rank=rank, gather=gather, **options)
    return results


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_evaluation_in_shares_equals_one(tmp_path, world_size, caplog):
    dataset, found = noisy_case(tmp_path)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "..coco_instances_results.json.part30.tmp").write_text("of a killed run")
    model, options = FakeModel(found), {"num_visualized": 3}
    expected = evaluate(model, dataset.loader(), dataset, tmp_path / "one", **options)
    results = in_shares(model, dataset, tmp_path / "many", world_size, **options)
    assert results_table(results.pop(0)) == results_table(expected)
    assert all(each == {} for each in results.values())
    one, many = (
        {p.relative_to(folder): content(p) for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "one", tmp_path / "many")
    )
    assert len(one) >= 5  # results, three images, the montage
    assert many == one
    assert "count as missed" not in caplog.text


def test_rank_0_logs_the_missing_images_of_rank_1(tmp_path, caplog):
    """An image that cannot be read, and one that the loader does not yield."""
    dataset = GreyDataset(coco_json([], 4), tmp_path)
    dataset.loader = lambda loader=dataset.loader: (
        [sample | {"image": None} if sample["image_id"] == 2 else sample]
        for (sample,) in loader()
        if sample["image_id"] != 4
    )
    model = FakeModel({i: detections([rectangle(1, 1, 9, 9)], [0], [0.5]) for i in range(1, 5)})
    in_shares(model, dataset, tmp_path / "out", 2, num_visualized=4)
    assert "1 of 4 images of grey cannot be read" in caplog.text
    assert "1 of 4 images of grey did not come" in caplog.text
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_detections_are_restored_from_results():
    mask = rectangle(3, 4, 10, 12)
    found = detections([mask, ~mask], [2, 0], [0.875, 0.5])
    again = detections_of(coco_results(found, 1, CATEGORY_IDS), CATEGORY_IDS)
    for key in ("boxes", "scores", "labels", "masks"):
        assert np.array_equal(again[key], found[key].numpy()), key
    assert detections_of([], CATEGORY_IDS)["boxes"].shape == (0, 4)


# ---- launch ----


@pytest.mark.parametrize(
    "codes, times, first",
    [
        ({0: 1, 1: -9}, (5, 5), 1),  # rank 0 lost the connection
        ({0: 1, 1: -9}, (5, 35), 0),  # the launcher killed rank 1, which did not end
        ({0: 2, 1: -15}, (5, 5), 0),  # the launcher stopped rank 1
        ({1: -9, 0: -9}, (5, 4), 0),
    ],
)
def test_the_rank_that_failed_first(monkeypatch, capsys, codes, times, first):
    """Times are in whole seconds, and a rank fails in the same one in which it loses another."""
    failures = {}
    for (rank, code), seconds in zip(codes.items(), times, strict=True):
        failures[rank] = ProcessFailure(rank, 100 + rank, code, "no file")
        failures[rank].timestamp = seconds

    def launch_agent(*args):
        raise ChildFailedError("run", failures)

    monkeypatch.setattr(launch, "launch_agent", launch_agent)
    assert launch.launch(["command"], num_processes=2) == max(1, codes[first])
    assert f"error: rank {first} of 2 (process {100 + first}) ended" in capsys.readouterr().err


def check(**arguments):
    defaults = {"device": "cpu", "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    launch.check_launch(**{**defaults, "dist_url": "auto", **arguments})


def test_valid_arguments_of_a_launch(monkeypatch):
    check()
    check(dist_url="tcp://10.0.0.1:29500", num_machines=4, machine_rank=3)
    check(dist_url="tcp://[fe80::1]:29500")
    check(device="auto", num_processes=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(device="auto")
    with pytest.raises(ValueError, match="has 2 available GPUs"):
        check(device="cuda", num_processes=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "auto"}, "MODEL.DEVICE cpu starts 2"),
        ({"num_machines": 0}, "numbered from 0"),
        ({"num_machines": 2, "machine_rank": 2}, "from 0 to 1"),
        ({"machine_rank": -1}, "--machine-rank -1"),
        ({"num_machines": 2}, "auto is for one machine"),
        ({"dist_url": "10.0.0.1:29500"}, "tcp://host:port"),
        ({"dist_url": "tcp://10.0.0.1"}, "tcp://host:port"),
        ({"dist_url": "tcp://10.0.0.1:99999"}, "tcp://host:port"),
        ({"dist_url": "file:///tmp/x"}, "tcp://host:port"),
    ],
)
def test_invalid_arguments_of_a_launch(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(**arguments)


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed._own_gpu("auto", rank) for rank in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="which has 2: start fewer"):
        distributed._own_gpu("cuda", 2)
    with pytest.raises(ValueError, match="a GPU of its own"):
        distributed._own_gpu("cuda:1", 0)
