"""The ``tarragon`` command. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tarragon import config as config_module
from tarragon.admin import AdminClient
from tarragon.config import Config
from tarragon.options import with_settings

if TYPE_CHECKING:
    from tarragon.models.shape import MoeModel

USAGE_EXIT_CODE: Final = 2
_DEMO: Final = "demo"

app = typer.Typer(
    help="Serve mixture-of-experts models from workers that may die: no reader can tell.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it would print local variables, secrets among them
)
_PASS_ON: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
_PASS_ALL_ON: Final = {**_PASS_ON, "help_option_names": []}
"""For commands whose flags, --help among them, belong to the module that they run."""
_WorkerId = Annotated[str, typer.Argument(metavar="ID", help="Such as aw-0, ew-1 or gateway.")]
_ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with a table named tarragon.")]
_AdminHost = Annotated[str | None, typer.Option(help="Where the cluster's admin API listens.")]
_AdminPort = Annotated[int | None, typer.Option(help="Port of the cluster's admin API.")]
_AdminKeyFile = Annotated[
    str | None, typer.Option(help="File with the admin API's key; TARRAGON_ADMIN_KEY may hold it too.")
]
_AdminCertificate = Annotated[
    str | None, typer.Option("--admin-ssl-certfile", help="The admin API's certificate: asks over HTTPS.")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv by default) and return the exit code.

    A user's fault is one sentence on stderr and exit code 2.
    """
    try:
        with _one_sentence():
            return int(app(argv, standalone_mode=False) or 0)
    except typer.TyperException as error:
        _complain(error.format_message())
        return USAGE_EXIT_CODE
    except typer.Exit as leaving:
        return leaving.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn a user's fault (a ValueError class of ours) into one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        if not type(error).__module__.startswith("tarragon."):
            raise
        _complain(str(error))
        raise typer.Exit(USAGE_EXIT_CODE) from error


def _complain(sentence: str) -> None:
    print(f"tarragon: {' '.join(sentence.split())}", file=sys.stderr)


# ------------------------------------------------------------------ serve


@app.command(context_settings=_PASS_ON)
@with_settings
def serve(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder of a checkpoint in Hugging Face form, or the word demo.")
    ],
    config: _ConfigFile = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Start nothing: print the placement and the memory of each worker."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Serve MODEL at an OpenAI-compatible API; any flag of `vllm serve` passes through to the engine."""
    started_s = time.monotonic()
    if model.startswith("-"):
        raise typer.BadParameter(
            f"MODEL must come before the flags that pass through, but {model} is in its place"
        )
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run only")
    if ctx.args and not ctx.args[0].startswith("-"):
        # vLLM's parser would take it for a model of its own, and nobody would ask for that.
        raise typer.BadParameter(f"one MODEL is served, but {ctx.args[0]} follows it")
    if dry_run:
        raise typer.Exit(_dry_run(config_module.load(config, flags=settings), model, as_json, ctx.args))
    from tarragon.agent import environment

    environment.prepare()
    merged = config_module.load(config, flags=settings)
    raise typer.Exit(_serve(merged, model, ctx.args, started_s))


@app.command("config")
@with_settings
def show_config(
    config: _ConfigFile = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference of all settings instead.")
    ] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Print the settings that hold as a TOML file, and where each came from; starts nothing."""
    from tarragon import config_text

    if markdown:
        print(config_text.reference(), end="")
    else:
        print(config_text.as_toml(config_module.load_settings(config, flags=settings)))


def _dry_run(config: Config, model: str, as_json: bool, engine_args: list[str]) -> int:
    """Print what would be started; return 2, having said why, if it cannot run on this host."""
    from rich.console import Console

    from tarragon import planning_report
    from tarragon.agent import environment, preflight
    from tarragon.models.shape import read_model

    folder = _demo_folder() if model == _DEMO else Path(model)
    shape = read_model(folder)
    preflight.check_sizes(shape)
    if not preflight.certainly_pass(engine_args):
        environment.prepare()
        _check_with_vllm(config, folder, shape.dtype, engine_args)
    plan = planning_report.plan(
        config, shape, preflight.memory_available_bytes(), len(os.sched_getaffinity(0))
    )
    if as_json:
        print(json.dumps(planning_report.as_json(plan)))
    else:
        planning_report.show(plan, Console())
    if plan.refusal:
        _complain(plan.refusal)
    return USAGE_EXIT_CODE if plan.refusal else 0


def _serve(config: Config, model: str, engine_args: list[str], started_s: float) -> int:
    """Check what can be checked before any process is started, then become the node agent."""
    from tarragon.agent import console, environment, preflight
    from tarragon.models.shape import read_model
    from tarragon.security import exposure

    folder = _demo_folder() if model == _DEMO else Path(model)
    shape = read_model(folder)
    preflight.check_sizes(shape)
    experts_bytes = shape.experts_total * shape.expert_bytes
    exposure.check(config, engine_args)
    preflight.check_ports(config)
    preflight.check_memory(
        config, shape.weight_bytes - experts_bytes, experts_bytes, preflight.memory_available_bytes()
    )
    _check_placement(config, shape)
    preflight.check_tokenizer(folder, engine_args)
    if not preflight.certainly_pass(engine_args):  # what is wrong is said before anything is started
        _check_with_vllm(config, folder, shape.dtype, engine_args)
    from tarragon.agent.agent import NodeAgent

    agent = NodeAgent(
        config,
        str(folder),
        engine_args=engine_args,
        console=partial(console.watch, config, started_s),
        check=partial(_check_with_vllm, config, folder, shape.dtype, engine_args),
        stop_with_pid=int(os.environ.get(environment.STOP_WITH_PID, 0)),
        expert_memory=preflight.expert_memory(config, shape),
    )
    return agent.run()


def _check_placement(config: Config, shape: MoeModel) -> None:
    """Raise PlacementError if the experts do not fit into the memory that expert workers may use for them."""
    from tarragon.orchestrator.planning import ExpertShape, Planner

    if config.expert_memory_bytes_max:  # else any number fits
        Planner(config, ExpertShape(len(shape.moe_layers), shape.experts, shape.expert_bytes)).first()


def _check_with_vllm(config: Config, folder: Path, dtype: str, engine_args: list[str]) -> None:
    """Raise FlagError or ModelRefused, each with one sentence: vLLM itself parses its flags."""
    from tarragon.gateway import flags

    flags.split_flags(engine_args)
    flags.check_dtype(engine_args, dtype)
    flags.check_model(folder)


def _demo_folder() -> Path:
    """Folder of the demo model, made first if need be: elsewhere, because that runs parallel regions."""
    from tarragon.models.demo import SOURCE_LAYERS, Recipe, default_directory, is_complete

    if not is_complete(default_directory(), Recipe(experts=8, top_k=2, layers=SOURCE_LAYERS, seed=0)):
        made = subprocess.run(
            [sys.executable, "-m", "tarragon", "demo-model"], stdout=sys.stderr, check=False
        )
        if made.returncode:
            raise typer.Exit(made.returncode)
    return default_directory()


# ------------------------------------------------------------------ a running cluster


def _admin(host: str | None, port: int | None, key_file: str | None, ssl_certfile: str | None) -> AdminClient:
    flags = {
        "admin_host": host,
        "admin_port": port,
        "admin_key_file": key_file,
        "admin_ssl_certfile": ssl_certfile,
    }
    return AdminClient.of(config_module.load(flags=flags))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the machine-readable contract.")] = False,
    admin_host: _AdminHost = None,
    admin_port: _AdminPort = None,
    admin_key_file: _AdminKeyFile = None,
    admin_ssl_certfile: _AdminCertificate = None,
) -> None:
    """Show the workers of a running cluster and where its experts are."""
    found = _admin(admin_host, admin_port, admin_key_file, admin_ssl_certfile).status()
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console

    from tarragon.display import summary, workers_table

    console = Console()
    console.print(summary(found), highlight=False)
    console.print(workers_table(found))


@app.command()
def top(
    admin_host: _AdminHost = None,
    admin_port: _AdminPort = None,
    admin_key_file: _AdminKeyFile = None,
    admin_ssl_certfile: _AdminCertificate = None,
) -> None:
    """Watch a running cluster in the terminal: workers, experts, failures; keys kill, drain, add."""
    admin = _admin(admin_host, admin_port, admin_key_file, admin_ssl_certfile)
    admin.status()  # where nothing runs, one sentence is better than an empty screen
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("top needs a terminal; `tarragon status` does not")
    from tarragon.observability.top import Top

    Top(admin).run()


@app.command()
def kill(
    worker_id: _WorkerId,
    signal: Annotated[str, typer.Option(help="Name of the signal, such as SIGKILL or SIGSTOP.")] = "SIGKILL",
    admin_host: _AdminHost = None,
    admin_port: _AdminPort = None,
    admin_key_file: _AdminKeyFile = None,
    admin_ssl_certfile: _AdminCertificate = None,
) -> None:
    """Send a signal to one worker."""
    _admin(admin_host, admin_port, admin_key_file, admin_ssl_certfile).kill(worker_id, signal)
    print(f"{worker_id}: {signal} sent")


@app.command()
def drain(
    worker_id: _WorkerId,
    admin_host: _AdminHost = None,
    admin_port: _AdminPort = None,
    admin_key_file: _AdminKeyFile = None,
    admin_ssl_certfile: _AdminCertificate = None,
) -> None:
    """Move one worker's work to the others, then stop it."""
    _admin(admin_host, admin_port, admin_key_file, admin_ssl_certfile).drain(worker_id)
    print(f"{worker_id}: draining")


@app.command()
def add(
    role: Annotated[str, typer.Argument(metavar="attention|expert")],
    admin_host: _AdminHost = None,
    admin_port: _AdminPort = None,
    admin_key_file: _AdminKeyFile = None,
    admin_ssl_certfile: _AdminCertificate = None,
) -> None:
    """Start one more attention or expert worker."""
    if role not in ("attention", "expert"):
        raise typer.BadParameter(f'a worker can be added as "attention" or "expert", but not as "{role}"')
    answer = _admin(admin_host, admin_port, admin_key_file, admin_ssl_certfile).add(role)
    print(f"{answer.get('worker_id', role)}: starting")


# ------------------------------------------------------------------ models, demo, benchmarks


@app.command("demo-model")
def demo_model(
    directory: Annotated[
        Path | None,
        typer.Argument(help="Where to write it, anew; without, it is made once, in the cache folder."),
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    layers: Annotated[
        int | None, typer.Option(help="Keep only the first layers.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the experts' perturbations and the gates.")] = 0,
    wheel: Annotated[Path | None, typer.Option(help="A copy of the package with the source model.")] = None,
) -> None:
    """Make the demo model: a small chat model, upcycled to a mixture of experts; print its folder."""
    from tarragon.models import demo

    make = demo.build_demo_model if directory else demo.ensure_demo_model
    with _bars() as progress:
        built = make(
            directory,  # type: ignore[arg-type] # None goes to ensure_demo_model only
            experts=experts,
            layers=layers,
            seed=seed,
            wheel=wheel,
            progress=progress,
        )
    print(built)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress on a terminal, gone afterwards; none elsewhere: stderr is for the sentence of a failure."""
    from rich.console import Console
    from rich.progress import Progress

    from tarragon.display import Bars

    console = Console(stderr=True)
    if not console.is_interactive:
        yield None
        return
    with Progress(console=console, transient=True) as progress:
        yield Bars(progress)


@app.command()
def demo() -> None:
    """The five-minute proof: two workers are killed in mid-sentence, and the text stays the same."""
    from tarragon.demo import main as run_demo

    raise typer.Exit(run_demo([]))


@app.command(context_settings=_PASS_ALL_ON)
def bench(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Which benchmark; its own flags follow.")],
) -> None:
    """Run one benchmark; each takes --json FILE and --plot FILE.png."""
    module = name.replace("-", "_")
    if module not in (found := _benchmarks()):
        raise typer.BadParameter(f"there is no benchmark {name}; there are: {', '.join(found) or 'none'}")
    from tarragon.bench.machine import warn_of_niceness

    warn_of_niceness()
    raise typer.Exit(_run_module(f"tarragon.bench.{module}", ctx.args))


@app.command(context_settings=_PASS_ALL_ON)
def simulate(ctx: typer.Context) -> None:
    """Run the pure parts of the system against seeded failures, faster than time."""
    raise typer.Exit(_run_module("tarragon.simulate", ctx.args))


def _run_module(name: str, args: list[str]) -> int:
    return int(importlib.import_module(name).main(args))


def _benchmarks() -> list[str]:
    package = importlib.util.find_spec("tarragon.bench")
    folders = (package.submodule_search_locations or []) if package else []
    return sorted(
        file.stem
        for folder in folders
        for file in Path(folder).glob("*.py")
        # Without importing: some of them would load torch, and helpers have no main.
        if "\ndef main(" in file.read_text(encoding="utf-8")
    )


if __name__ == "__main__":
    sys.exit(main())
