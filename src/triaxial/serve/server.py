"""The HTTP application: OpenAI's paths, health, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from triaxial import __version__
from triaxial.serve import errors
from triaxial.serve.answer import Answerer
from triaxial.serve.chat import ChatFormat, chat_choices
from triaxial.serve.completions import CompletionFormat, completion_choices
from triaxial.serve.errors import ApiError
from triaxial.serve.gate import Gate
from triaxial.serve.limits import Door, Limits
from triaxial.serve.metrics import Metrics
from triaxial.serve.protocol import ChatRequest, CompletionRequest, SamplingFields
from triaxial.serve.replicas import Replicas
from triaxial.serve.replies import (
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    ReplicaHealth,
    Version,
)
from triaxial.serve.respond import now, respond
from triaxial.serve.served import Served

_ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request, or what to wait for."},
    "5XX": {"model": ErrorBody, "description": "No replica can answer."},
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_EVENTS = {"content": {"text/event-stream": {"schema": _EVENT}}}
"""A schema of each event: OpenAPI before 3.2 has none of a stream."""


@dataclass
class House:
    """All that the application needs. `draining` is set when it is about to end."""

    served: Served
    replicas: Replicas
    metrics: Metrics
    limits: Limits
    places: int
    """Sequences that all replicas together decode at the same time."""
    api_key: str | None = None
    draining: bool = False
    started: int = field(default_factory=now)
    door: Door = field(init=False)

    def __post_init__(self) -> None:
        self.door = Door(self.limits, self.places)

    @property
    def health(self) -> Health:
        status = "draining" if self.draining else "ready" if self.replicas.ready else "unavailable"
        states = [ReplicaHealth(replica=r.index, state=r.state, cause=r.cause) for r in self.replicas.all]
        return Health(status=status, replicas=states)

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.served.name, created=self.started, max_model_len=self.served.max_len)

    def require(self, asked: SamplingFields, prompts: int) -> None:
        """Refuse what need not be looked at more closely."""
        if asked.model not in (None, self.served.name):
            raise no_such_model(self.served.name)
        self.door.require_room(prompts * asked.choices)


def no_such_model(served: str) -> ApiError:
    return ApiError(404, f"no such model here; there is {served}", param="model", code="model_not_found")


def build_app(house: House) -> FastAPI:
    app = FastAPI(
        title="Triaxial", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    app.include_router(_openai(house))
    app.include_router(_operations(house))
    app.add_middleware(
        Gate,
        limits=house.limits,
        api_key=house.api_key,
        draining=lambda: house.draining,
    )
    app.add_exception_handler(ApiError, errors.answer_api_error)
    app.add_exception_handler(HTTPException, errors.answer_http_error)
    app.add_exception_handler(RequestValidationError, errors.answer_invalid)
    app.add_exception_handler(Exception, errors.answer_bug)
    return app


def _openai(house: House) -> APIRouter:
    # The gate checks the key, before a body is read; this only tells the API's description of it.
    key = [] if house.api_key is None else [Depends(HTTPBearer(auto_error=False))]
    router = APIRouter(prefix="/v1", responses=_ERRORS, dependencies=key)
    served, limits = house.served, house.limits
    answerer = Answerer(house.replicas, served.tokenizer, house.door, limits.timeout_s)

    @router.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[house.card])

    @router.get("/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name != served.name:
            raise no_such_model(served.name)
        return house.card

    @router.post("/completions", responses={200: {"model": Completion, **_EVENTS}}, response_model=None)
    async def completions(asked: CompletionRequest) -> Response:
        house.require(asked, len(asked.prompts))
        choices = await completion_choices(asked, served)
        return await respond(answerer, choices, asked, CompletionFormat(asked, choices, served))

    @router.post("/chat/completions", responses={200: {"model": ChatCompletion, **_EVENTS}}, response_model=None)
    async def chat_completions(asked: ChatRequest) -> Response:
        house.require(asked, 1)
        choices = await chat_choices(asked, served)
        return await respond(answerer, choices, asked, ChatFormat(asked, choices, served))

    return router


def _operations(house: House) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Not ready."}})
    async def health() -> Response:
        """200 if all ranks of all replicas work."""
        body = house.health
        return JSONResponse(body.model_dump(), 200 if body.status == "ready" else 503)

    @router.get("/version")
    async def version() -> Version:
        return Version(version=__version__)

    @router.get(
        "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}, response_model=None
    )
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(house.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
