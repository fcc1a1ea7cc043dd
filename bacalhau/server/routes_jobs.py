"""Routes of jobs: create, apply, and the verbs; their logs and results."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from bacalhau.kinds import JOB
from bacalhau.replies import (
    JobApplied,
    LogResume,
    RerunRequest,
    ResultItem,
    Results,
    StopRequest,
)
from bacalhau.server.actions import Applied
from bacalhau.server.bodies import json_body, manifest_body, read_json, read_manifest
from bacalhau.server.context import Context, actor_of
from bacalhau.server.log_replies import LOG_RESPONSES, LogParameters, log_response
from bacalhau.server.origin import Origin
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import READ_ERRORS, WRITE_ERRORS, object_path, path_ref
from bacalhau_api.base import Model
from bacalhau_api.meta import Ref
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Job

_APPLY_WORDS = (
    "The body is a `kind: Job` manifest or a flat Bacalhau job, as JSON or YAML. Applying what is "
    "stored already changes nothing; changing labels or policies runs nothing again. With "
    "`dryRun=true` it is checked, and the outcome told, but nothing is stored."
)
_DryRun = Annotated[bool, Query(alias="dryRun", description="Check, but store nothing.")]


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of jobs."""
    _add_create(router, context)
    _add_apply(router, context)
    _add_stop_and_rerun(router, context)
    _add_suspend(router, context)
    _add_reads(router, context)


def _add_create(router: APIRouter, context: Context) -> None:
    words: dict[str, Any] = {
        "status_code": 201,
        "responses": {201: {"model": JobApplied}, **WRITE_ERRORS},
        "summary": "Create a job",
        "description": _APPLY_WORDS + " A job without a name is given one.",
        "openapi_extra": manifest_body("Job"),
        "tags": ["jobs"],
    }

    async def create(
        request: Request, namespace: str | None, origin: Provenance, dry_run: bool
    ) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        default_name = f"job-{context.services.ids.uid()[:8]}"
        job, warnings = await read_manifest(
            request, Job, namespace=namespace, name=None, default_name=default_name
        )
        applied = await context.actions.apply_job(
            job,
            actor_of(request),
            dry_run=dry_run,
            create_only=True,
            provenance=origin,
            is_canonical=True,
        )
        return _applied(applied, warnings, status=201)

    @router.post(JOB.path(), operation_id="createJob", **words)
    async def create_anywhere(
        request: Request, origin: Origin, dry_run: _DryRun = False
    ) -> Response:
        return await create(request, None, origin, dry_run)

    @router.post(
        object_path(JOB).removesuffix("/{name}"), operation_id="createJobInNamespace", **words
    )
    async def create_in_namespace(
        request: Request, namespace: str, origin: Origin, dry_run: _DryRun = False
    ) -> Response:
        return await create(request, namespace, origin, dry_run)


def _add_apply(router: APIRouter, context: Context) -> None:
    async def apply(
        request: Request, namespace: str, name: str, origin: Origin, dry_run: _DryRun = False
    ) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        job, warnings = await read_manifest(request, Job, namespace=namespace, name=name)
        applied = await context.actions.apply_job(
            job, actor_of(request), dry_run=dry_run, provenance=origin, is_canonical=True
        )
        return _applied(applied, warnings, status=201 if applied.outcome == "created" else 200)

    for method in ("PUT", "PATCH"):
        router.add_api_route(
            object_path(JOB),
            apply,
            methods=[method],
            operation_id=f"{'apply' if method == 'PUT' else 'patch'}Job",
            summary="Create a job or change it to what is given",
            description=_APPLY_WORDS,
            responses={200: {"model": JobApplied}, 201: {"model": JobApplied}, **WRITE_ERRORS},
            openapi_extra=manifest_body("Job"),
            tags=["jobs"],
        )


def _applied(applied: Applied, warnings: tuple[str, ...], *, status: int) -> Response:
    assert isinstance(applied.item, Job)
    both = tuple(dict.fromkeys(warnings + applied.warnings))
    return object_response(
        JobApplied(outcome=applied.outcome, warnings=both, job=applied.item), status
    )


def _add_stop_and_rerun(router: APIRouter, context: Context) -> None:
    def verb(word: str, body: type[Model], words: str) -> dict[str, Any]:
        schema = body.model_json_schema(by_alias=True)
        return {
            "path": object_path(JOB, f"/{word}"),
            "operation_id": f"{word}Job",
            "summary": words,
            "responses": {200: {"model": Job}, **WRITE_ERRORS},
            "openapi_extra": json_body(schema, required=False),
            "tags": ["jobs"],
        }

    @router.post(**verb("stop", StopRequest, "Stop the present generation of a job"))
    async def stop(request: Request, namespace: str, name: str) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        asked = await read_json(request, StopRequest, required=False)
        ref = path_ref("Job", namespace, name)
        job = await context.actions.stop_job(ref, actor_of(request), asked.message)
        return object_response(job)

    @router.post(**verb("rerun", RerunRequest, "Run an unchanged job again, or what of it failed"))
    async def rerun(request: Request, namespace: str, name: str) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        asked = await read_json(request, RerunRequest, required=False)
        nonce = asked.nonce or context.services.ids.uid()[:12]
        ref = path_ref("Job", namespace, name)
        job = await context.actions.rerun_job(
            ref, actor_of(request), nonce, only_failed=asked.failed
        )
        return object_response(job)


def _add_suspend(router: APIRouter, context: Context) -> None:
    def verb(word: str, words: str) -> dict[str, Any]:
        return {
            "path": object_path(JOB, f"/{word}"),
            "operation_id": f"{word}Job",
            "summary": words,
            "responses": {200: {"model": Job}, **WRITE_ERRORS},
            "tags": ["jobs"],
        }

    async def set_suspend(request: Request, ref: Ref, *, suspend: bool) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        job = await context.actions.suspend_job(ref, actor_of(request), suspend=suspend)
        return object_response(job)

    @router.post(**verb("suspend", "Start nothing more of a job until it is resumed"))
    async def suspend(request: Request, namespace: str, name: str) -> Response:
        return await set_suspend(request, path_ref("Job", namespace, name), suspend=True)

    @router.post(**verb("resume", "Let a suspended job go on"))
    async def resume(request: Request, namespace: str, name: str) -> Response:
        return await set_suspend(request, path_ref("Job", namespace, name), suspend=False)


def _add_reads(router: APIRouter, context: Context) -> None:
    @router.get(
        object_path(JOB, "/logs"),
        operation_id="jobLogs",
        summary="The output of all executions of a job",
        responses=LOG_RESPONSES,
        tags=["jobs"],
    )
    async def logs(
        request: Request,
        namespace: str,
        name: str,
        asked: LogParameters,
        generation: Annotated[int | None, Query(ge=1, description="Default: the present.")] = None,
    ) -> Response:
        job = context.find(Job, path_ref("Job", namespace, name))
        records = context.logs.of_job(job.ref, generation, asked)
        return await log_response(request, records)

    @router.post(
        object_path(JOB, "/logs"),
        operation_id="resumeJobLogs",
        summary="The same, going on where an earlier read was",
        responses=LOG_RESPONSES,
        openapi_extra=json_body(LogResume.model_json_schema(by_alias=True), required=True),
        tags=["jobs"],
    )
    async def resume_logs(
        request: Request,
        namespace: str,
        name: str,
        asked: LogParameters,
        generation: Annotated[int | None, Query(ge=1, description="Default: the present.")] = None,
    ) -> Response:
        job = context.find(Job, path_ref("Job", namespace, name))
        resume = await read_json(request, LogResume)
        asked = replace(asked, offsets=resume.offsets)
        records = context.logs.of_job(job.ref, generation, asked)
        return await log_response(request, records)

    @router.get(
        object_path(JOB, "/results"),
        operation_id="jobResults",
        summary="The accepted results of a job",
        responses={200: {"model": Results}, **READ_ERRORS},
        tags=["jobs"],
    )
    async def results(
        namespace: str,
        name: str,
        generation: Annotated[int | None, Query(ge=1, description="Default: the present.")] = None,
    ) -> Response:
        job = context.find(Job, path_ref("Job", namespace, name))
        return object_response(results_of(context, job, generation or job.metadata.generation))


def results_of(context: Context, job: Job, generation: int) -> Results:
    """The accepted results of one generation."""
    cache = context.cache
    accepted = [
        a
        for a in cache.owned_by(job.metadata.uid, "Acceptance")
        if isinstance(a, Acceptance) and a.spec.slot.generation == generation
    ]
    accepted.sort(key=lambda a: (a.spec.slot.partition, a.spec.slot.node))
    is_present = generation == job.metadata.generation
    return Results(
        job=job.name,
        uid=job.metadata.uid,
        generation=generation,
        slots=job.status.slots.total if is_present else len(accepted),
        items=tuple(_result(context, a) for a in accepted),
    )


def _result(context: Context, acceptance: Acceptance) -> ResultItem:
    cache, spec = context.cache, acceptance.spec
    namespace = acceptance.ref.namespace
    execution = cache.get(Ref("Execution", namespace, spec.execution))
    publication = cache.get(Ref("Publication", namespace, spec.execution))
    report = execution.status.report if isinstance(execution, Execution) else None
    delivery = publication if isinstance(publication, Publication) else None
    delivered = delivery.status.report if delivery else None
    node = cache.get(Ref("Node", "", spec.node))
    contact = getattr(getattr(node, "status", None), "contact", None)
    return ResultItem(
        slot=str(spec.slot),
        partition=spec.slot.partition,
        execution=spec.execution,
        execution_uid=spec.execution_uid,
        node=spec.node,
        reachable=contact == "Reachable" and report is not None,
        exit_code=report.exit_code if report else None,
        outputs=report.outputs if report else None,
        publication=str(delivery.status.phase) if delivery else "",
        location=delivered.location if delivered else None,
    )
