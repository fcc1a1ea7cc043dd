"""Reads a directory once, without a server, and says what is wrong with it."""

from dataclasses import replace
from pathlib import Path

from bacalhau.gitops.tree import DirectoryTree
from bacalhau.gitops.wire import SourceRequest
from bacalhau.system import SystemClock
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.v1.source import SourceSpec
from bacalhau_controllers.gitops import TreeView
from bacalhau_controllers.gitops.plan import check_declared, declared_once


async def check_directory(root: Path, asked: SourceRequest) -> TreeView:
    """The directory, with all problems that need nothing but itself to be found. Raises
    InvalidError if it cannot be read as a whole."""
    given = {key: getattr(asked, key) for key in asked.model_fields_set}
    view = await DirectoryTree(root, SystemClock()).read(SourceSpec(**given))
    if view.absent:
        raise InvalidError([Problem(str(root), view.absent)])
    _, twice = declared_once(view)
    wrong = [problem for item in view.declared if (problem := check_declared(item)) is not None]
    return replace(view, problems=(*view.problems, *wrong, *twice.values()))
