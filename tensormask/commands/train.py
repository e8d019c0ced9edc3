"""Train or evaluate a config: `tensormask train --config-file quickstart`.

The options are detectron2's; `KEY VALUE` pairs override the config. Several processes are started
by `--num-gpus` or by `torchrun`.
"""

import argparse
import sys

from tensormask.commands import EXIT_MISTAKE
from tensormask.commands.common import CommandParser, add_config_file, add_overrides, name_splits
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
from tensormask.utils.memory import OutOfMemory, explain_out_of_memory

EXIT_FAILED = 1
_ADVICE = "Free the memory that other processes use, or choose another device (MODEL.DEVICE)."


def build_parser(command: str = "train") -> CommandParser:
    """Return the parser of `train`, or of `evaluate`, which has `--eval-only` set."""
    only_evaluates = command == "evaluate"
    parser = CommandParser(
        command,
        description="Evaluate a TensorMask model on DATASETS.TEST."
        if only_evaluates
        else "Train or evaluate a TensorMask model.",
        example="--config-file quickstart MODEL.WEIGHTS output/quickstart/model_final.pth"
        if only_evaluates
        else "--config-file tensormask_R_50_FPN_1x SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.005 "
        "OUTPUT_DIR output/small",
    )
    add_config_file(parser, default="")
    start = parser.add_mutually_exclusive_group().add_argument
    start("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    start(
        "--overwrite",
        action="store_true",
        help=argparse.SUPPRESS
        if only_evaluates
        else "replace the run in OUTPUT_DIR; otherwise a new run goes to OUTPUT_DIR_2, _3, ...",
    )
    add = parser.add_argument
    add(
        "--eval-only",
        action="store_true",
        default=only_evaluates,
        help=argparse.SUPPRESS
        if only_evaluates
        else "do not train; evaluate MODEL.WEIGHTS, or with --resume the last checkpoint",
    )
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="number of processes on this machine, each with its own GPU, or with MODEL.DEVICE cpu "
        'on the CPU; 0: one process, on the CPU if MODEL.DEVICE is "auto" (default: 1)',
    )
    add("--num-machines", type=int, default=1, metavar="M", help="number of machines")
    add("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    add(
        "--dist-url",
        default=AUTO,
        metavar="URL",
        help='tcp://host:port of machine 0; "auto" for one machine (default: auto)',
    )
    add_overrides(parser)
    return parser


def setup_config(args: argparse.Namespace) -> CfgNode:
    """Build the frozen config of the command line.

    Raises:
        UserError: an invalid option, key or value.
    """
    if args.num_gpus < 0:
        raise UserError(f"--num-gpus is {args.num_gpus}; give 0 or more")
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    name_splits(cfg)
    if args.num_gpus == 0 and cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def launch_processes(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Run this command in several processes, and return their common exit code.

    Raises:
        UserError: an invalid option, or one that contradicts `torchrun`.
    """
    if distributed.is_launched():
        raise UserError(
            "this process was started by torchrun or the like (RANK and WORLD_SIZE are set), which "
            "sets the number of processes: remove --num-gpus and --num-machines"
        )
    options = {
        "num_processes": max(1, args.num_gpus),
        "num_machines": args.num_machines,
        "machine_rank": args.machine_rank,
        "dist_url": args.dist_url,
    }
    check_launch(device=cfg.MODEL.DEVICE, **options)
    command = [sys.executable, "-m", "tensormask.commands.train"]
    command += ["--num-gpus", str(min(1, args.num_gpus)), "--config-file", args.config_file]
    command += ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
    command += ["--eval-only"] * args.eval_only
    return launch([*command, *args.opts], **options)


def main(arguments: list[str] | None = None, command: str = "train") -> int:
    """Run the command `train` or `evaluate`.

    Returns:
        0; 1 for a failed run, 2 for a user's mistake, each with one line on stderr; 128 plus the
        number of the signal that stopped the run.

    Raises:
        Exception: a bug, or a failure of the machine. Its traceback is also in `log.txt`.
    """
    parser = build_parser(command)
    try:
        args = parser.parse_args(arguments)
        if not args.config_file and (not args.opts or len(args.opts) % 2):  # also `train NAME`
            parser.error("name a config with --config-file")
        cfg = setup_config(args)
        if args.num_gpus > 1 or args.num_machines != 1 or args.machine_rank:
            return launch_processes(args, cfg)
        distributed.start(cfg.MODEL.DEVICE)
        with explain_out_of_memory("the setup of the run", _ADVICE):  # later ones say more
            if args.eval_only:
                evaluate_only(cfg, resume=args.resume)
            else:
                train(cfg, resume=args.resume, overwrite=args.overwrite)
        distributed.stop()
    except (NonFiniteError, OutOfMemory, UnexpectedResultsError, DiskFullError) as error:
        return _fail(error, EXIT_FAILED)
    except (UserError, OSError) as error:
        return _fail(error, EXIT_MISTAKE)
    except TrainingStopped as stopped:
        return stopped.exit_code
    return 0


def _fail(error: Exception, exit_code: int) -> int:
    print(f"{distributed.rank_prefix()}error: {error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":  # a process that `launch_processes` started
    sys.exit(main())
