"""How `--help` names options' values and arguments: as the documentation does, not by Python types."""

from typing import Any

from typer.core import TyperCommand


class HelpfulCommand(TyperCommand):
    """A command whose options show a word for their value, such as `--namespace NAMESPACE`, and
    whose arguments stand in its usage as they are named."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        params: list[Any] = list(self.params)
        for param in params:
            if param.param_type_name == "option" and not param.is_flag and param.metavar is None:
                param.metavar = (param.name or "value").upper().replace("_", "-")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words behind the command's name."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        names = [param.metavar or (param.name or "").upper() for param in arguments]
        return ["[OPTIONS]", *names]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options alone: what arguments are stands in the usage and the text."""
        records = [
            record
            for param in self.get_params(ctx)
            if param.param_type_name == "option" and (record := param.get_help_record(ctx))
        ]
        with formatter.section("Options"):
            formatter.write_dl(records)
