"""The command line: one sub-command per job, each thin: parse, build, call.

Exit codes: 0 done, or preempted (SIGTERM) after a clean save; 2 the user's mistake, one line on standard error;
130 interrupted by hand after a clean save; 1 anything else.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from opus_jax.errors import (
    InterruptedRunError,
    JoinError,
    LostProcessError,
    NonFiniteLossError,
    PreemptedRunError,
    UserError,
)

DONE, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {
    UserError: USER_MISTAKE,
    NonFiniteLossError: FAILED,
    JoinError: FAILED,
    LostProcessError: FAILED,
    PreemptedRunError: DONE,  # to be started again: summary.json is there only when the run is over
    InterruptedRunError: INTERRUPTED,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from opus_jax.distributed.platform import choose_platform

    args = _parse(arguments)
    choose_platform()
    try:
        _fetch(args)
        args.run(args)
        return DONE
    except tuple(EXIT_CODES) as error:
        if args.debug:
            traceback.print_exc()
        print(f"opus-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        if code in (FAILED, USER_MISTAKE):
            _leave_at_once(code, together=code == USER_MISTAKE)
        return code
    except KeyboardInterrupt:
        print(f"opus-jax {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        _leave_at_once(FAILED, traceback.format_exc())
        raise


def _leave_at_once(code: int, said: str = "", *, together: bool = False) -> None:
    """Where other processes would be waited for in vain; before JAX has been imported there are none."""
    if "jax" in sys.modules:
        from opus_jax.distributed.lost import leave_at_once

        leave_at_once(code, said, together=together)


# --------------------------------------------------------------------------------------------- commands


def _prepare(args: argparse.Namespace) -> None:
    from opus_jax.data.prepare import prepare

    print(prepare(_config(args)))


def _train(args: argparse.Namespace) -> None:
    from opus_jax.training.goodput import in_words
    from opus_jax.training.loop import train
    from opus_jax.training.profiler import profiled_steps

    config = _config(args)
    profile = profiled_steps(args.profile)
    speaks = _join()
    summary = train(config, profile=profile)
    if speaks:
        print(f"{config.run.dir}: {summary['steps']} steps, target {summary['target_bits_per_byte']:.3f} bits per byte")
        if "goodput_seconds" in summary:  # a run that ended before it was kept has none
            print(in_words(summary["goodput_seconds"]))


def _evaluate(args: argparse.Namespace) -> None:
    from opus_jax.training.inference import evaluate_run

    speaks = _join()
    found = evaluate_run(Path(args.config), tuple(args.overrides))
    if speaks:
        print(json.dumps(found, indent=2))


def _generate(args: argparse.Namespace) -> None:
    from opus_jax.models.decoding import Sampling
    from opus_jax.training.inference import generate_text

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    overrides = tuple(args.overrides)
    for piece in generate_text(Path(args.config), args.prompt, args.tokens, sampling, args.seed, overrides):
        print(piece, end="", flush=True)
    print()


def _score(args: argparse.Namespace) -> None:
    from opus_jax.training.score_corpus import score_corpus, verdict

    settings = {"split": args.split, "output": args.output, "planted": tuple(args.planted), "relative": args.relative}
    speaks = _join()
    found = score_corpus(args.config, tuple(args.overrides), **settings)
    for line in verdict(found) if speaks else ():
        print(line)


def _report(args: argparse.Namespace) -> None:
    from opus_jax.data.remote import Remote
    from opus_jax.reports.html import write_report
    from opus_jax.reports.run import load_run
    from opus_jax.reports.verdict import verdict

    settings = _config(args).report
    page = write_report(Path(args.config), compare=tuple(Path(d) for d in args.compare), settings=settings)
    run = load_run(args.config)
    for line in verdict(run, baseline=args.compare[0] if args.compare else None):
        print(line)
    if args.address is not None:
        Remote(args.address).upload(page, page.name)
    print(args.address or page)


def _compile(args: argparse.Namespace) -> None:
    from opus_jax.distributed.compile import compile_for

    steps = tuple(filter(None, args.steps.split(",")))
    compile_for(
        _config(args), args.topology, slices=args.slices, steps=steps, json_file=args.json, suggest=args.suggest
    )


def _doctor(args: argparse.Namespace) -> None:
    from opus_jax.doctor import examine

    raise SystemExit(examine())


def _fetch(args: argparse.Namespace) -> None:
    """Where a subject is an address (gs://, s3://), work on a copy of it."""
    if "://" in getattr(args, "config", ""):
        args.address, args.config = args.config, _fetched(args.config, args.command)
    if hasattr(args, "compare"):
        args.compare = [_fetched(place, args.command) if "://" in place else place for place in args.compare]


def _fetched(address: str, command: str) -> str:
    from opus_jax.config import CorpusConfig
    from opus_jax.data.cache import cache_folder
    from opus_jax.data.remote import local_copy
    from opus_jax.training.remote_run import fetched_run

    cache = cache_folder(CorpusConfig())
    if address.endswith((".yaml", ".yml")):
        return str(local_copy(address, cache))
    return str(fetched_run(address, cache, checkpoints=command in ("evaluate", "generate", "score")))


def _join() -> bool:
    """Join the other processes of this command, if it has some; whether this one prints what all have found."""
    import jax

    from opus_jax.distributed.processes import start_processes

    start_processes()
    return jax.process_index() == 0


def _config(args: argparse.Namespace) -> Any:
    from opus_jax.config import Config

    return Config.load(args.config, args.overrides)


# ---------------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does, its first argument if it has one, and an example of the rest of its line."""

    action: Callable[[argparse.Namespace], None]
    text: str
    subject: str | None = None
    example: str = ""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


SUBJECTS = {"CONFIG": "a YAML file, or a run folder", "RUN": "a run folder"}

COMMANDS = {
    "prepare": Command(
        _prepare, "tokenize and pack the corpus", "CONFIG", "configs/quickstart.yaml corpus.row_tokens=256"
    ),
    "train": Command(
        _train,
        "train; prepares what is missing, resumes by itself",
        "CONFIG",
        "configs/quickstart.yaml selection.temperature=0.25",
        {
            "--profile": {
                "metavar": "steps=A:B",
                "help": "trace steps A to B - 1 into RUN/profile, for XProf; 10:13 is steps 10, 11 and 12",
            },
        },
    ),
    "evaluate": Command(
        _evaluate, "bits per byte of a run's newest checkpoint", "RUN", "runs/quickstart evaluation.rows=500"
    ),
    "generate": Command(
        _generate,
        "write text with a run's newest checkpoint",
        "RUN",
        'runs/quickstart --prompt "def "',
        {
            "--prompt": {"default": "", "help": "text to go on from"},
            "--tokens": {"type": int, "default": 100, "help": "tokens to write at most (default 100)"},
            "--temperature": {"type": float, "default": 0.8, "help": "0 = always the likeliest token (default 0.8)"},
            "--top-k": {"type": int, "help": "sample among the k likeliest tokens only"},
            "--top-p": {"type": float, "help": "sample among the likeliest tokens of this total probability"},
            "--seed": {"type": int, "default": 0, "help": "another seed, another text (default 0)"},
        },
    ),
    "score": Command(
        _score,
        "write the utility of every row and document of a corpus under a run's newest checkpoint",
        "RUN",
        "runs/quickstart corpus.path=texts --output scores",
        {
            "--output": {"metavar": "DIR", "help": "where the scores go (default RUN/scores/SPLIT)"},
            "--split": {"default": "train", "help": "train, validation or proxy documents (default train)"},
            "--planted": {
                "action": "append",
                "default": [],
                "metavar": "DOMAIN",
                "help": "a domain known to be bad, counted in roc.json; may be repeated",
            },
            "--relative": {
                "action": "store_true",
                "help": "utilities relative to the average row of the run's stream: better for filtering",
            },
        },
    ),
    "report": Command(
        _report,
        "write report.html of a run",
        "RUN",
        "runs/quickstart --compare runs/quickstart-random",
        {
            "--compare": {
                "action": "append",
                "default": [],
                "metavar": "RUN",
                "help": "a run to show beside it; may be repeated (default: RUN-random if there)",
            }
        },
    ),
    "compile": Command(
        _compile,
        "compile the steps for a TPU that is not there",
        "CONFIG",
        "configs/quickstart.yaml --topology v5p:2x2x4",
        {
            "--topology": {"required": True, "help": "for example v5p:2x2x4, v5e:4x4, v6e:2x4"},
            "--slices": {"type": int, "default": 1, "metavar": "N", "help": "so many of them (set mesh.replica too)"},
            "--steps": {
                "default": "",
                "metavar": "NAMES",
                "help": "of train,plain,score,decode (default: all that the configuration has)",
            },
            "--suggest": {"action": "store_true", "help": "where a step does not fit, look for settings that do"},
            "--json": {"type": Path, "metavar": "FILE", "help": "also write the figures there"},
        },
    ),
    "doctor": Command(_doctor, "check this machine and installation"),
}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments on one line, like any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="opus-jax",
        description="Train language models on the data that moves them most.",
        epilog=f"example: opus-jax train {COMMANDS['train'].example}",
    )
    places = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _add(places, name, command)
    return parser


def _add(places: Any, name: str, command: Command) -> None:
    example = f"example: opus-jax {name} {command.example}".rstrip()
    parser = places.add_parser(name, help=command.text, description=command.text, epilog=example)
    if command.subject is not None:
        parser.add_argument("config", metavar=command.subject, help=SUBJECTS[command.subject])
        parser.add_argument(
            "overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to the configuration"
        )
    for flag, settings in command.options.items():
        parser.add_argument(flag, **settings)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.set_defaults(run=command.action, address=None)


if __name__ == "__main__":
    sys.exit(main())
