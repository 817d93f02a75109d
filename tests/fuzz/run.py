"""Coverage-guided fuzzing of one decoder or all: ``python tests/fuzz/run.py [NAME] [SECONDS]``.

Each target runs in a process of its own; an input that makes one stumble is written beside the corpus, in
build/fuzz/NAME, and the exit code is 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SECONDS_DEFAULT = 60
CORPORA = Path("build/fuzz")
INPUT_BYTES_MAX = 4_096
INPUT_S_MAX = 60
"""By the clock: a virtual machine that others share may stand still for 13 s, in the middle of any input."""
MEMORY_MIB_MAX = 4_096
"""Of the whole process, torch included."""


def fuzz(name: str, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["tarragon"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus = CORPORA / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-artifact_prefix={corpus}/",
        f"-timeout={INPUT_S_MAX}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.run)
    atheris.Fuzz()


def main() -> int:
    names, seconds = sys.argv[1:2], int(sys.argv[2]) if len(sys.argv) > 2 else SECONDS_DEFAULT
    if names and names != ["all"]:
        fuzz(names[0], seconds)
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in TARGETS:
        print(f"{name}: {seconds} s", flush=True)
        command = [sys.executable, __file__, name, str(seconds)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"stumbled: {', '.join(failed)}" if failed else "no decoder stumbled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
