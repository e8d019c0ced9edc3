"""Each key that another config changes on a resume is refused, or named with its effect."""

from functools import reduce
from operator import getitem

import pytest
import yaml

from tensormask.config import changes, get_cfg
from tensormask.config.changes import EFFECTS, Effect
from tensormask.config.node import leaves
from tensormask.utils.errors import UserError

KEYS = [key for key, _ in leaves(get_cfg())]


def prefixes(key):
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def test_every_key_has_exactly_one_effect():
    """A new key of defaults.py needs a line in `EFFECTS`."""
    for key in KEYS:
        effects = [e for e, names in EFFECTS.items() for name in names if name in prefixes(key)]
        assert effects == [changes.effect_of(key)], key
    known = {prefix for key in KEYS for prefix in prefixes(key)}
    assert [name for names in EFFECTS.values() for name in names if name not in known] == []


def saved_text(cfg, overrides):
    tree = yaml.safe_load(cfg.dump())
    for key, value in overrides.items():
        *groups, leaf = key.split(".")
        reduce(getitem, groups, tree)[leaf] = value
    return yaml.safe_dump(tree)


def test_every_change_is_refused_or_logged_with_both_values(caplog):
    cfg = get_cfg()
    solver = (cfg.SOLVER.AMP, cfg.SOLVER.EMA, cfg.SOLVER.CLIP_GRADIENTS)
    for group in (*solver, cfg.TEST.AMP, cfg.TEST.AUG, cfg.INPUT.CROP):
        group.ENABLED = True  # else their other keys have no effect
    new = dict(leaves(yaml.safe_load(cfg.dump())))
    numbers = {"SOLVER.WARMUP_ITERS": 7, "SOLVER.WARMUP_SHARE": 0.5, "SOLVER.MAX_ITER": 90}
    old = {**dict.fromkeys(KEYS, "formerly"), **numbers}
    found = changes.find_changes(saved_text(cfg, old), cfg)
    expected = {e: {key for key in KEYS if changes.effect_of(key) is e} for e in Effect}
    for_cosine = {"SOLVER.BASE_LR_END"}
    expected[Effect.TRAINED] -= for_cosine
    expected[Effect.UNUSED] |= for_cosine
    assert {e: set(pairs) for e, pairs in found.items()} == expected
    with pytest.raises(UserError) as caught:
        changes.check_changes(found, "out/model_0000009.pth")
    assert "MODEL.WEIGHTS out/model_0000009.pth, without --resume" in str(caught.value)
    for finished in (False, True):
        caplog.clear()
        changes.log_changes(found, done=10, finished=finished)
        applied, unused, *_ = caplog.messages
        assert applied.startswith("Resuming with another config than before, applied ")
        assert unused.startswith("Other config values without effect on this run: ")
        lines_of = {Effect.APPLIED: applied, Effect.UNUSED: unused}
        lines_of[Effect.REFUSED] = str(caught.value)
        lines_of[Effect.TRAINED] = unused if finished else applied
        for effect, pairs in found.items():
            for key in pairs.keys() - {"MODEL.TENSOR_MASK.HEAD"}:
                assert f"{key} {old[key]} -> {str(new[key])[:60]}" in lines_of[effect]


def test_nothing_is_said_of_an_unchanged_config(caplog):
    cfg = get_cfg()
    tree = yaml.safe_load(cfg.dump())
    del tree["DATASETS"]["STRICT"], tree["SOLVER"]["EMA"]  # of an earlier version
    tree["SOLVER"]["OF_AN_EARLIER_VERSION"] = 3
    found = changes.find_changes(yaml.safe_dump(tree), cfg)
    assert not any(found.values())
    changes.log_changes(found, done=3, finished=False)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "changed, others, used",
    [
        (("MOMENTUM", "NESTEROV"), {"OPTIMIZER": "SGD"}, True),
        (("MOMENTUM", "NESTEROV"), {"OPTIMIZER": "AdamW"}, False),
        (("STEPS", "GAMMA"), {"LR_SCHEDULER_NAME": "WarmupCosineLR"}, False),
        (("BASE_LR_END",), {"LR_SCHEDULER_NAME": "WarmupCosineLR"}, True),
        (("BASE_LR_END",), {}, False),
        (("EMA.DECAY", "AMP.DTYPE", "CLIP_GRADIENTS.CLIP_VALUE"), {}, False),
        (("EMA.DECAY", "EMA.ENABLED"), {"EMA.ENABLED": True}, True),
        (("AMP.ENABLED", "EMA.ENABLED", "CLIP_GRADIENTS.ENABLED"), {}, True),
        (("WARMUP_FACTOR", "WARMUP_METHOD"), {"WARMUP_ITERS": 11}, True),
        (("WARMUP_FACTOR", "WARMUP_METHOD"), {"WARMUP_ITERS": 10}, False),
        (("WARMUP_FACTOR",), {"WARMUP_SHARE": 0.11, "MAX_ITER": 100}, True),
        (("WARMUP_FACTOR",), {"WARMUP_SHARE": 0.1, "MAX_ITER": 100}, False),
    ],
)
def test_options_that_others_switch_off_are_not_named_as_applied(changed, others, used):
    cfg = get_cfg()
    for key, value in others.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    saved = saved_text(cfg, {f"SOLVER.{key}": "formerly" for key in changed})
    found = changes.find_changes(saved, cfg, done=10)
    expected = {f"SOLVER.{key}" for key in changed}
    assert expected == {*found[Effect.TRAINED if used else Effect.UNUSED]} | {
        *found[Effect.APPLIED]
    }


@pytest.mark.parametrize(
    "old, new, used, unused",
    [
        ({"WARMUP_ITERS": 5}, {"WARMUP_ITERS": 20}, True, False),
        ({"WARMUP_ITERS": 20}, {"WARMUP_ITERS": 5}, True, False),
        ({"WARMUP_ITERS": 5}, {"WARMUP_ITERS": 10}, False, True),
        ({"WARMUP_ITERS": 10}, {"WARMUP_ITERS": 0}, False, True),
        ({"WARMUP_SHARE": 0.2}, {"WARMUP_SHARE": 0.05}, True, False),
        ({"WARMUP_SHARE": 0.1}, {"WARMUP_SHARE": 0.05}, False, True),
        ({"WARMUP_SHARE": 0.0, "WARMUP_ITERS": 5}, {"WARMUP_SHARE": 0.2}, True, True),
        ({"WARMUP_SHARE": 0.2}, {"WARMUP_SHARE": 0.0, "WARMUP_ITERS": 5}, True, False),
        # As long as the old run, which was longer, would have had it.
        ({"WARMUP_SHARE": 0.05, "MAX_ITER": 400}, {"WARMUP_SHARE": 0.1}, True, False),
    ],
)
def test_another_length_of_the_warm_up_counts_until_both_have_ended(old, new, used, unused):
    cfg = get_cfg()
    cfg.SOLVER.update({"MAX_ITER": 100, **new})
    saved = saved_text(cfg, {f"SOLVER.{key}": value for key, value in old.items()})
    found = changes.find_changes(saved, cfg, done=10)
    names = {key for key in found[Effect.TRAINED] if "WARMUP" in key}
    assert [bool(names), bool(found[Effect.UNUSED])] == [used, unused]


@pytest.mark.parametrize(
    "old, new, changed",
    [
        (("auto", True, True), ("bipyramid", True, True), False),
        (("upscale_aligned", True, False), ("auto", True, False), True),
        (("auto", False, False), ("simple_natural", False, False), False),
        (("simple_natural", False, False), ("upscale_natural", False, False), True),
    ],
)
def test_two_spellings_of_a_mask_head(old, new, changed):
    names = [f"MODEL.TENSOR_MASK.{key}" for key in ("HEAD", "ALIGNED_ON", "BIPYRAMID_ON")]
    cfg = get_cfg()
    for name, value in zip(names, new, strict=True):
        cfg.MODEL.TENSOR_MASK[name.rpartition(".")[2]] = value
    found = changes.find_changes(saved_text(cfg, dict(zip(names, old, strict=True))), cfg)
    assert bool(found[Effect.REFUSED]) is changed
