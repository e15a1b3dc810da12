"""The door of the program: every error that a user can mend is one screen and an exit code.

Hydra prints and exits by itself, so it is told to raise instead. Nothing heavy is imported here:
`--help`, `--cfg job` and tab completion pass through.
"""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mediphi.door.files import tame_hydra
from mediphi.errors import ConfigError, MachineError, UserError

SECRET = re.compile(r"(key|token|password|passwd|secret)(@[\w.]*)?[\"']?\s*[=:]", re.IGNORECASE)
DOTTED = re.compile(r"(?!hydra\.)[A-Za-z_]\w*(\.[\w-]+)+=")


def one_line_errors(task: Callable[[Any], float | None]) -> Callable[[Any], float | None]:
    """Let a stage end in an exit code: one line for a `UserError`, a traceback for a defect.

    `SystemExit` passes through Hydra, which would print the overrides first and exit with 1.
    """

    @functools.wraps(task)
    def guarded(cfg: Any) -> float | None:
        try:
            return task(cfg)
        except UserError as error:
            _end(error)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:  # `| head`: `enter` ends it
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _end(MachineError(f"{error.filename or 'disk'}: {error.strerror}"))
            _end_with_traceback()
        except Exception:
            _end_with_traceback()

    return guarded


def enter(main: Callable[..., object]) -> None:
    """Run `main`, a function under `@hydra.main` and `one_line_errors`, on `sys.argv`."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise, instead of printing and exiting
    try:
        _refuse_secrets(sys.argv[1:])
        sys.argv[1:] = [forced(argument) for argument in sys.argv[1:]]
        tame_hydra()
        main()
        sys.stdout.flush()
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:  # composing failed: a stage's own errors are exits by now
        _end(_diagnosed(error))


def forced(argument: str) -> str:
    """`a.b=c` as `++a.b=c`: the schema knows more keys than the YAML files spell out, and judges.

    Groups (`stage=pit`), prefixed overrides and Hydra's own keys stay as they are.
    """
    return f"++{argument}" if DOTTED.match(argument) else argument


def _refuse_secrets(arguments: list[str]) -> None:
    """Arguments are seen by every user of the machine and recorded by loggers.

    A name of a secret counts wherever it stands: `a={b_key: c}` is one, and Hydra would echo what
    it cannot read.
    """
    keys = [re.split(r"[={\[(:\s]", a)[0] or "argument" for a in arguments if SECRET.search(a)]
    if keys:
        raise ConfigError(
            [f"{key}: secrets come from the environment, never from arguments" for key in keys]
        )


def _diagnosed(error: Exception) -> ConfigError:
    """Compose again, piece by piece, to tell every problem and not only Hydra's first."""
    from hydra._internal.utils import get_args_parser
    from hydra.types import RunMode

    from mediphi.door.compose import diagnose, make_loader

    args = get_args_parser().parse_args()
    extra = Path(args.config_dir) if args.config_dir else None
    if extra is not None and not extra.is_dir():
        return ConfigError([f"--config-dir={extra}: no such folder"])
    lines = diagnose(
        make_loader(Path(sys.argv[0]).resolve().parent / (args.config_path or "conf"), extra),
        args.config_name or "config",
        args.overrides,
        run_mode=RunMode.MULTIRUN if args.multirun else RunMode.RUN,
        error=error,
    )
    return ConfigError(lines or [" ".join(str(error).split()) or type(error).__name__])


def _end(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code) from None


def _end_with_traceback() -> NoReturn:
    traceback.print_exc()
    raise SystemExit(1) from None
