"""Links by which published results can be downloaded for a while, without any other right.

Made when they are asked for and stored nowhere: they are as good as a password.
"""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from bacalhau.kinds import PUBLICATION
from bacalhau.replies import LinkAnswer
from bacalhau.server.context import Context
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import READ_ERRORS, object_path, path_parameters, path_ref
from bacalhau_api.errors import NotFoundError, UnavailableError
from bacalhau_api.v1.execution import Execution, Publication

SECONDS_DEFAULT = 3600
SECONDS_MAX = 7 * 86400


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of links."""

    @router.get(
        object_path(PUBLICATION, "/link"),
        operation_id="linkPublication",
        summary="A link to download a published archive",
        responses={200: {"model": LinkAnswer}, **READ_ERRORS},
        openapi_extra=path_parameters(PUBLICATION),
        tags=[PUBLICATION.plural],
    )
    async def link(
        request: Request,
        seconds: Annotated[
            int, Query(ge=1, le=SECONDS_MAX, description="How long it can be used.")
        ] = SECONDS_DEFAULT,
    ) -> Response:
        parts = request.path_params
        ref = path_ref("Publication", parts["namespace"], parts["name"])
        if context.cache.get(ref) is None:
            execution = context.find(Execution, path_ref("Execution", ref.namespace, ref.name))
            raise NotFoundError(
                f"the outputs of {ref.name} are not published: its result was not accepted, or job "
                f"{execution.spec.job} names no publisher"
            )
        publication = context.find(Publication, ref)
        report = publication.status.report
        if report is None or report.location is None:
            why = f": {report.message or report.reason}" if report and report.reason else ""
            raise NotFoundError(
                f"{ref.name} is not published yet{why}",
                hint=f"bacalhau wait {publication.spec.job} --for delivered",
            )
        if context.services.sign is None:
            raise UnavailableError("this orchestrator signs no links")
        url = await context.services.sign(report.location, seconds)
        answer = object_response(LinkAnswer(url=url, seconds=seconds))
        answer.headers["Cache-Control"] = "no-store"
        return answer
