"""Train or evaluate a config: `python tools/train_net.py --config-file configs/quickstart.yaml`.

The options are detectron2's; `KEY VALUE` pairs at the end override the config. `--num-gpus` or
`torchrun` start several processes.
"""

import argparse
import logging
import sys
import traceback
from pathlib import Path

import tensormask
from tensormask.config import CfgNode, get_cfg
from tensormask.engine import distributed
from tensormask.engine.anomaly import NonFiniteError
from tensormask.engine.evaluator import evaluate_only
from tensormask.engine.launch import AUTO, check_launch, launch
from tensormask.engine.signals import TrainingStopped
from tensormask.engine.trainer import train
from tensormask.evaluation import UnexpectedResultsError
from tensormask.utils.errors import UserError
from tensormask.utils.files import DiskFullError

logger = logging.getLogger("tensormask.commands.train")

EXIT_FAILED = 1
EXIT_MISTAKE = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `opts` holds the trailing `KEY VALUE` words."""
    parser = argparse.ArgumentParser(
        description="Train a TensorMask, or evaluate one.",
        epilog="example: train_net.py --config-file configs/tensormask_R_50_FPN_1x.yaml "
        "SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.005 OUTPUT_DIR output/small",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS, or with --resume the last checkpoint, and do not train",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, each on its own GPU, or with MODEL.DEVICE cpu on the CPU; "
        '1: what MODEL.DEVICE says; 0: the CPU where MODEL.DEVICE is "auto" (default: 1)',
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="M", help="machines that take part"
    )
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="R", help="which of them this is, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default=AUTO,
        metavar="URL",
        help='tcp://host:port of machine 0; "auto" for one machine (default: auto)',
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )
    return parser.parse_args(arguments)


def setup_config(args: argparse.Namespace) -> CfgNode:
    """Make the frozen config that the command line asks for.

    Raises:
        ValueError: an option, a key or a value that is none.
    """
    if args.num_gpus < 0:
        raise UserError(f"--num-gpus is {args.num_gpus}; give 0 or more")
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if args.num_gpus == 0 and cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def launch_processes(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Run this command again in each process that the options ask for; the exit code of all.

    Raises:
        ValueError: an option that makes no sense, or that contradicts `torchrun`.
    """
    if distributed.is_launched():
        raise UserError(
            "this process is one of several already (RANK and WORLD_SIZE are set), of torchrun or "
            "the like, which says how many there are: leave out --num-gpus and --num-machines"
        )
    options = {
        "num_processes": max(1, args.num_gpus),
        "num_machines": args.num_machines,
        "machine_rank": args.machine_rank,
        "dist_url": args.dist_url,
    }
    check_launch(device=cfg.MODEL.DEVICE, **options)
    command = [
        sys.executable,
        "-m",
        "tensormask.commands.train",
        "--num-gpus",
        str(min(1, args.num_gpus)),
    ]
    command += ["--config-file", args.config_file]
    command += ["--resume"] * args.resume + ["--eval-only"] * args.eval_only
    return launch([*command, *args.opts], **options)


def is_for_the_user(error: Exception) -> bool:
    """Tell a message that this package has for its user from a bug, there or in a library."""
    if isinstance(error, OSError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    package = Path(tensormask.__file__).resolve().parent
    return package in raised_in.resolve().parents


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 1 for a failed run, 2 for a user's mistake."""
    args = parse_arguments(arguments)
    try:
        cfg = setup_config(args)
        if args.num_gpus > 1 or args.num_machines != 1 or args.machine_rank:
            return launch_processes(args, cfg)
        distributed.start(cfg.MODEL.DEVICE)
        run = evaluate_only if args.eval_only else train
        run(cfg, resume=args.resume)
        distributed.stop()
    except (NonFiniteError, UnexpectedResultsError, DiskFullError) as error:
        logger.error(error)
        return EXIT_FAILED
    except TrainingStopped as stopped:
        return stopped.exit_code
    except (ValueError, OSError) as error:
        if not is_for_the_user(error):
            raise
        print(f"{distributed.rank_prefix()}error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


if __name__ == "__main__":  # a process that `launch_processes` started
    sys.exit(main())
