"""The Slurm templates: where they are, `mae-scale slurm`, and how one is filled in for a job."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipeline.errors import UsageError
from data_pipeline.files import write_atomically
from mae_scale import __version__
from mae_scale.packaged import packaged

PROLOGUE = "environment.sh"
OWN = Path("slurm")
"""The site's own templates, in the folder where `mae-scale submit` is called."""
BESIDE = '$(dirname "$templates")/.venv'
"""The virtual environment that the prologue takes where nothing else is said; right in a checkout only."""
GPUS = {"gres": r"(?:^|,)gpu:(?:([^:,]*):)?(\d+)(?=,|$)", "gpus-per-node": r"^(?:(.*):)?(\d+)$"}
"""The type, which may be left out, and the number of GPUs per node in the value of sbatch's option."""


def find_template(name: str) -> Path:
    """Return ./slurm/NAME where there is one, else the package's."""
    own = OWN / name
    return own if own.is_file() else packaged("slurm") / name


def copy_templates(folder: Path) -> None:
    """Write the package's templates into a folder, to be changed there and sent with sbatch.

    The prologue is told the virtual environment that this runs in. Raises UsageError, with nothing written, when a
    file is there and says something else: what a site has changed is not lost.
    """
    files = {p.name: p.read_text(encoding="utf-8") for p in sorted(packaged("slurm").iterdir()) if p.is_file()}
    if venv() is not None:
        escaped = re.sub(r'([\\"$`}])', r"\\\1", str(venv()))
        files[PROLOGUE] = files[PROLOGUE].replace(BESIDE, escaped)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        changed = [
            name
            for name, text in files.items()
            if (folder / name).exists() and (folder / name).read_text(encoding="utf-8", errors="replace") != text
        ]
        if changed:
            raise UsageError(
                f"{folder} has templates that differ from those of mae-scale {__version__} ({', '.join(changed)}); "
                "nothing was written: move them away, or write into another folder and compare"
            )
        for name, text in files.items():
            write_atomically(folder / name, text.encode())
    except OSError as error:
        raise UsageError(f"the templates cannot be written into {folder}: {error.strerror}") from None
    print(f"{folder}: {', '.join(files)}")
    print(f"the site's facts stand at the head of {folder / PROLOGUE}, what a job asks for in the #SBATCH lines; then")
    print(f"    sbatch --nodes=N {folder / 'pretrain.sbatch'} RECIPE --out DIR data.root=/path/to/train")


def sbatch_options(template: str) -> dict[str, str]:
    """Return {option: value} of a template's #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)[ =]?(\S*)", template, flags=re.MULTILINE))


def gpus_of(options: Mapping[str, str]) -> int:
    """Return the GPUs per node that sbatch's options ask for."""
    return next((int(match[2]) for match in _gpus(options)), 0)


def gpu_type_of(options: Mapping[str, str]) -> str | None:
    """Return the type of GPU that sbatch's options ask for; None: any."""
    return next((match[1] or None for match in _gpus(options)), None)


def _gpus(options: Mapping[str, str]) -> Iterator[re.Match[str]]:
    found = (re.search(pattern, options.get(name, "")) for name, pattern in GPUS.items())
    return (match for match in found if match)


def ask_for_gpus(options: Mapping[str, str], gpus: int) -> dict[str, str | None]:
    """Return what options must become to ask for a number of GPUs in the way that they do; None: the line goes."""
    gres = options.get("gres", "")
    match = re.search(GPUS["gres"], gres)
    if match is None:
        kind = options.get("gpus-per-node", "").rpartition(":")
        return {"gpus-per-node": "".join((*kind[:2], str(gpus))) if gpus else None}
    asked = f"{gres[: match.start(2)]}{gpus}{gres[match.end(2) :]}"
    without = f"{gres[: match.start()]}{gres[match.end() :]}".strip(",")
    return {"gres": (asked if gpus else without) or None, "gpus-per-node": None}


def render(template: str, options: Mapping[str, str | int | None], arguments: list[str]) -> str:
    """Return the template with its #SBATCH lines replaced or, for new options, added to, and its arguments written in.

    An option that is None has no line.
    """
    lines, left = [], dict(options)
    for line in template.splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)", line)
        if option and option[1] in options:
            value = left.pop(option[1], None)
            lines += [] if value is None else [f"#SBATCH --{option[1]}={value}"]
        else:
            lines.append(line)
    new = [f"#SBATCH --{name}={value}" for name, value in left.items() if value is not None]
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    fixed = ["", "# Written by mae-scale submit.", f"set -- {shlex.join(arguments)}"]
    if venv() is not None:
        fixed.append(f'export VIRTUAL_ENV="${{VIRTUAL_ENV:-{venv()}}}"')
    return "\n".join([*lines[: last + 1], *new, *fixed, *lines[last + 1 :]]) + "\n"


def venv() -> Path | None:
    """Return the virtual environment that this runs in."""
    return Path(sys.prefix) if sys.prefix != sys.base_prefix else None
