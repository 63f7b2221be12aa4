"""Help as commands are typed: without more brackets around arguments, and without a type for options that take no value."""

from collections.abc import Sequence
from typing import Any

import typer.core


class Command(typer.core.TyperCommand):
    """`compare [OPTIONS] RUN.yaml`, where typer writes `{RUN.yaml}`."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(str(getattr(param, "metavar", None) or param.name) for param in arguments)]

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        return _without_types(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        return _without_types(super().get_params(ctx))


def _without_types(params: Sequence[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return list(params)
