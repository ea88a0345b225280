"""The tlfast command: one file a command."""

from __future__ import annotations

import typer

from . import bench, demo, doctor, embed, freeze, klite, ktn, ladder, offsite_reports, plan
from .output import Commands

app = typer.Typer(
    name="tlfast",
    help="Transfer what a large frozen model knows to a new task without back-propagating through it.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(ladder.app, name="ladder")
app.add_typer(klite.app, name="klite")
app.add_typer(ktn.app, name="ktn")
app.add_typer(offsite_reports.app, name="offsite")
for _command in (freeze.freeze, embed.embed, demo.demo, doctor.doctor, bench.bench, plan.plan):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
