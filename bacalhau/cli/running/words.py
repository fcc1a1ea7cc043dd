"""How the words of `docker run` and `wasm run` are taken apart: flags, then the image or module, then
what belongs to the workload, whatever it looks like."""

from collections.abc import Sequence
from typing import Any, Final

from bacalhau.cli import exits
from bacalhau.cli.helping import HelpfulCommand

_TRUE: Final = ("true", "1", "yes")
_FALSE: Final = ("false", "0", "no")


class RunCommand(HelpfulCommand):
    """Flags end at the first word that is none. `--wait=false` and the like are understood."""

    allow_interspersed_args = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As usual, with `--flag=true|false` of switches turned into switches, and without the
        `--` that stands between the image or module and the arguments."""
        flags, rest = split_flags(args, self.params)
        words = [word for flag in flags for word in switched(flag, self.params)]
        if len(rest) > 1:
            if rest[1] == "--":
                rest = [rest[0], *rest[2:]]
            elif rest[1].split("=")[0] in _long_names(self.params):
                exits.warn(
                    f"{rest[1]} stands behind {rest[0]}, so the workload gets it; flags of "
                    f"bacalhau go before {rest[0]}"
                )
        # A last `--` keeps what follows from being taken for flags.
        return super().parse_args(ctx, [*words, "--", *rest] if rest else words)


def split_flags(args: Sequence[str], params: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The flags with their values, and what follows; a `--` in between is left out."""
    with_value = {
        name
        for param in params
        if param.param_type_name == "option" and not param.is_flag
        for name in param.opts
    }
    at = 0
    while at < len(args):
        word = args[at]
        if word == "--":
            return list(args[:at]), list(args[at + 1 :])
        if not word.startswith("-") or word == "-":
            break
        at += 2 if _takes_next(word, with_value) else 1
    return list(args[:at]), list(args[at:])


def _takes_next(word: str, with_value: set[str]) -> bool:
    """Whether a flag has its value in the next word: `-e A=b`, `-fe A=b` and `--env A=b`, but not
    `-eA=b` and `--env=A=b`."""
    if word.startswith("--"):
        return word in with_value
    first = next((i for i, x in enumerate(word[1:], 1) if f"-{x}" in with_value), 0)
    return first == len(word) - 1


def switched(word: str, params: Sequence[Any]) -> list[str]:
    """`--wait=false` as `--no-wait`, `--follow=true` as `--follow`, `--follow=false` as nothing;
    any other word as it is."""
    name, sign, value = word.partition("=")
    if not sign or value.lower() not in (*_TRUE, *_FALSE):
        return [word]
    for param in params:
        if param.param_type_name == "option" and param.is_flag and name in param.opts:
            if value.lower() in _TRUE:
                return [name]
            return list(param.secondary_opts[:1])
    return [word]


def _long_names(params: Sequence[Any]) -> set[str]:
    return {
        name
        for param in params
        if param.param_type_name == "option"
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--") and not param.hidden
    }
