"""The command line: one sub-command per job, each thin: parse, build, call.

Exit codes: 0 done; 2 the user's mistake, one line on standard error; 130 interrupted after a clean save;
1 anything else.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opus_jax.errors import UserError

DONE, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from opus_jax.distributed.platform import choose_platform

    args = _parse(arguments)
    choose_platform()
    from opus_jax.training.interrupt import InterruptedRunError

    try:
        args.run(args)
        return DONE
    except UserError as error:
        if args.debug:
            raise
        print(f"opus-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    except InterruptedRunError as stopped:
        print(f"opus-jax {args.command}: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"opus-jax {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


# --------------------------------------------------------------------------------------------- commands


def _prepare(args: argparse.Namespace) -> None:
    from opus_jax.data.prepare import prepare

    print(prepare(_config(args)))


def _train(args: argparse.Namespace) -> None:
    from opus_jax.training.loop import train

    config = _config(args)
    summary = train(config)
    print(f"{config.run.dir}: {summary['steps']} steps, target {summary['target_bits_per_byte']:.3f} bits per byte")


def _evaluate(args: argparse.Namespace) -> None:
    from opus_jax.training.inference import evaluate_run

    print(json.dumps(evaluate_run(Path(args.config), tuple(args.overrides)), indent=2))


def _generate(args: argparse.Namespace) -> None:
    from opus_jax.models.decoding import Sampling
    from opus_jax.training.inference import generate_text

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    for piece in generate_text(Path(args.config), args.prompt, args.tokens, sampling, args.seed):
        print(piece, end="", flush=True)
    print()


def _report(args: argparse.Namespace) -> None:
    from opus_jax.reports.html import write_report
    from opus_jax.reports.run import load_run
    from opus_jax.reports.verdict import verdict

    settings = _config(args).report
    page = write_report(Path(args.config), compare=tuple(Path(d) for d in args.compare), settings=settings)
    run = load_run(args.config)
    for line in verdict(run, baseline=args.compare[0] if args.compare else None):
        print(line)
    print(page)


def _compile(args: argparse.Namespace) -> None:
    from opus_jax.distributed.compile import compile_for

    compile_for(_config(args), args.topology, json_file=args.json)


def _doctor(args: argparse.Namespace) -> None:
    from opus_jax.doctor import examine

    raise SystemExit(examine())


def _config(args: argparse.Namespace) -> Any:
    from opus_jax.config import Config

    return Config.load(args.config, args.overrides)


# ---------------------------------------------------------------------------------------------- parsing


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opus-jax", description="Train language models on the data that moves them most.",
        epilog="example: opus-jax train configs/quickstart.yaml selection.temperature=0.25",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(
        commands,
        "prepare",
        _prepare,
        "tokenize and pack the corpus of a config",
        "configs/quickstart.yaml corpus.row_tokens=256",
    )
    _add(
        commands,
        "train",
        _train,
        "train; prepares what is missing, resumes by itself",
        "configs/quickstart.yaml selection.temperature=0.25",
    )
    _add(
        commands,
        "evaluate",
        _evaluate,
        "bits per byte of a run's newest checkpoint",
        "runs/quickstart evaluation.rows=500",
        run=True,
    )
    generate = _add(
        commands,
        "generate",
        _generate,
        "write text with a run's newest checkpoint",
        'runs/quickstart --prompt "def "',
        run=True,
    )
    generate.add_argument("--prompt", default="", help="text to go on from")
    generate.add_argument("--tokens", type=int, default=100, help="tokens to write at most (default 100)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default 0.8)")
    generate.add_argument("--top-k", type=int, default=None, help="sample among the k likeliest tokens only")
    generate.add_argument(
        "--top-p", type=float, default=None, help="sample among the likeliest tokens of this total probability"
    )
    generate.add_argument("--seed", type=int, default=0)
    report = _add(
        commands,
        "report",
        _report,
        "write report.html of a run",
        "runs/quickstart --compare runs/quickstart-random",
        run=True,
    )
    report.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="RUN",
        help="a run to show beside it; may be repeated (default: RUN-random if there)",
    )
    compile_ = _add(
        commands,
        "compile",
        _compile,
        "compile the training step for a TPU that is not there",
        "configs/quickstart.yaml --topology v5p:2x2x4",
    )
    compile_.add_argument("--topology", required=True, help="for example v5p:2x2x4, v5e:4x4, v6e:2x4")
    compile_.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the figures there")
    doctor = commands.add_parser("doctor", help="check this machine and installation")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add(
    commands: Any,
    name: str,
    action: Callable[[argparse.Namespace], None],
    text: str,
    example: str,
    *,
    run: bool = False,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, epilog=f"example: opus-jax {name} {example}")
    if run:
        parser.add_argument("config", metavar="RUN", help="a run folder")
    else:
        parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.set_defaults(run=action)
    return parser


if __name__ == "__main__":
    sys.exit(main())
