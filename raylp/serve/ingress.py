"""What answers at the endpoint: OpenAI's paths, sentences to translate, a page, health and metrics.

Runs in a process of its own behind Ray Serve's proxy, before the engines. Imports Ray's serving, so that only what
serves imports this.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, OpenAIHTTPException
from ray.llm._internal.serve.utils.server_utils import get_response_for_error
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, ErrorResponse
from starlette.exceptions import HTTPException
from vllm.exceptions import VLLMClientError

from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.generate.base import Request as Wanted
from raylp.generate.base import to_output
from raylp.generate.translate import Fitted, fit, one_line, read_stop_rule
from raylp.models.load import load_tokenizer
from raylp.names import kind_of, whole_of
from raylp.serve.gate import RETRY_AFTER_S, TRAFFIC, Held, TooManyError, told_error
from raylp.serve.slo import AUTO, Chooser, one_for_each_depth, read_objective

HEALTH_S = 1.0
MODEL_HEADER = "x-raylp-model"
PAGE = Path(__file__).parent / "page.html"
ROUTES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "translate": lambda app: app.post("/translate"),
    "page": lambda app: app.get("/"),
    "health": lambda app: app.get("/health"),
    "metrics": lambda app: app.get("/metrics"),
}


class Sentences(BaseModel):
    """What /translate is asked. `pair`: may be left out where the run has one; `model`: where it serves one."""

    model_config = ConfigDict(extra="forbid")

    sentences: list[str]
    pair: str | None = None
    model: str | None = None


class RunIngress(OpenAiIngress):
    """`run`: `prompt`, `pairs`, `models` ({name: {"path", "layers"}}), `slo` or None, `max_sentences`, `max_waiting`,
    `max_model_len`, `keys`: whether one must be sent.

    The rest as Ray's own.
    """

    def __init__(self, llm_deployments: dict[str, Any], model_cards: dict[str, Any], *, run: dict[str, Any]) -> None:
        super().__init__(llm_deployments, model_cards)
        self.run = run
        self.prompt = Prompt.model_validate(run["prompt"])
        models: dict[str, dict[str, Any]] = run["models"]
        self.chooser: Chooser | None = None
        if run["slo"]:
            deepest_first = one_for_each_depth({name: model["layers"] for name, model in models.items()})
            self.chooser = Chooser(deepest_first, read_objective(run["slo"]), is_failure=_is_failure)
        # The models of a run share both: they are cut from one.
        path = Path(next(iter(models.values()))["path"])
        self.tokenizer = load_tokenizer(path)
        self.rule = read_stop_rule(path, self.tokenizer, self.prompt.newline)
        self._health: tuple[float, dict[str, Any]] = (float("-inf"), {})

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions, of a model of the run or of `auto`."""
        return await self._timed(super().completions, body, request)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """OpenAI's chat completions, of a model of the run or of `auto`."""
        for place, message in enumerate(body.messages):
            for key in ("content", "tool_calls"):
                parts = message.get(key)
                if parts is not None and not isinstance(parts, str):
                    try:
                        message[key] = list(parts)  # they are checked only as they are taken
                    except ValueError as error:
                        said = f"messages.{place}.{key}: parts that are not as OpenAI's chat has them"
                        raise HTTPException(400, said) from error
        return await self._timed(super().chat, body, request)

    async def translate(self, body: Sentences, request: Request) -> Response:
        """One translation for each sentence, in order, by the run's prompt; a blank one for a blank one."""
        self._few(len(body.sentences), "sentences")
        pair = self._pair(body.pair)
        started = time.perf_counter()
        lines = [one_line(sentence) for sentence in body.sentences]
        asked = [place for place, line in enumerate(lines) if line]
        more = max(0, len(asked) - 1)
        load = TRAFFIC.at_work + more
        model = self._model(body.model, load)
        with TRAFFIC.more(more, self.run["max_waiting"]), self._timing(model, load) if asked else nullcontext():
            fitted = await asyncio.to_thread(self._fit, [lines[place] for place in asked], pair)
            made = await all_or_none([self._answer(model, one.request) for one in fitted])
        texts = [""] * len(lines)
        for place, text in zip(asked, made, strict=True):
            texts[place] = text
        cut = [place for place, one in zip(asked, fitted, strict=True) if one.cut]
        ms = round((time.perf_counter() - started) * 1000, 1)
        answer = {"model": model, "pair": pair, "translations": texts, "cut": cut, "ms": ms}
        return JSONResponse(answer, headers={MODEL_HEADER: model})

    async def model(self, model_id: str) -> ModelCard | None:
        """What is known of a model; `auto` is one where there is an objective to choose by."""
        if model_id == AUTO and self.chooser is not None:
            first = next(iter(self._model_cards.values()))
            return first.model_copy(update={"id": AUTO, "metadata": {"slo": self.run["slo"]}})
        return await super().model(model_id)

    async def models(self) -> Any:
        """What may be asked for: the models, and `auto` where there is an objective to choose by."""
        found = await super().models()
        if self.chooser is not None:
            found.data.append(await self.model(AUTO))
        return found

    async def page(self) -> HTMLResponse:
        """Type a sentence, see models side by side."""
        names = [*self.run["models"], *([AUTO] if self.chooser is not None else [])]
        known = {
            "pairs": self.run["pairs"],
            "models": names,
            "shown": side_by_side(list(self.run["models"])),
            "keys": self.run["keys"],
        }
        text = json.dumps(known).replace("<", "\\u003c")  # so that nothing in it can end the script
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("{{ known }}", text))

    async def health(self) -> JSONResponse:
        """200 when every model answers, 503 with the state of each when not; looked up once a second at most.

        A model answers while one of its replicas runs, whatever becomes of the others.
        """
        from ray import serve

        if time.monotonic() - self._health[0] > HEALTH_S:
            name = serve.get_replica_context().app_name
            found = (await asyncio.to_thread(serve.status)).applications[name]
            states = {name: str(state.status.value) for name, state in found.deployments.items()}
            answer = all(state.replica_states.get("RUNNING", 0) for state in found.deployments.values())
            status = "RUNNING" if answer else str(found.status.value)
            self._health = time.monotonic(), {"status": status, "deployments": states}
        content = dict(self._health[1])
        ready = content["status"] == "RUNNING" and not TRAFFIC.draining
        content["status"] = "ok" if ready else "draining" if TRAFFIC.draining else content["status"].lower()
        return JSONResponse(content, 200 if ready else 503)

    async def metrics(self) -> PlainTextResponse:
        """For Prometheus: requests, their times, and how many are at work."""
        return PlainTextResponse(generate_latest(TRAFFIC.registry), media_type=CONTENT_TYPE_LATEST)

    async def drain(self) -> int:
        """Lets nothing new in; how many requests are still at work. Asked by the driver, over Ray."""
        TRAFFIC.draining = True
        return TRAFFIC.at_work

    def _pair(self, wanted: str | None) -> str:
        pairs = self.run["pairs"]
        if wanted is None and len(pairs) == 1:
            return str(pairs[0])
        if wanted not in pairs:
            raise HTTPException(400, f"pair: one of {', '.join(pairs)}, as the run was made for; not {wanted}")
        return str(wanted)

    def _model(self, wanted: str | None, load: int) -> str:
        """The model that answers.

        Raises:
            HTTPException: none of that name is served, or none is named where there are several.
        """
        names = list(self.run["models"])
        if wanted == AUTO and self.chooser is not None:
            return self.chooser.choose(load)
        if wanted is None and len(names) == 1:
            return str(names[0])
        if wanted not in names:
            said = "which model?" if wanted is None else "no such model is served:"
            auto = [AUTO] if self.chooser is not None else []
            raise HTTPException(400 if wanted is None else 404, f"model: {said} one of {', '.join([*names, *auto])}")
        return str(wanted)

    def _few(self, count: int, what: str) -> None:
        most = self.run["max_sentences"]
        if count > most:
            raise HTTPException(413, f"{count} {what}, {most} at a time are the most")

    def _fit(self, lines: Sequence[str], pair: str) -> list[Fitted]:
        try:
            return [fit(self.tokenizer, self.prompt, line, pair, self.run["max_model_len"]) for line in lines]
        except UserError as error:
            raise HTTPException(400, str(error)) from error

    async def _timed(
        self, answer: Callable[[Any, Request], Awaitable[Response]], body: Any, request: Request
    ) -> Response:
        """The answer of a model, which `auto` is replaced by; its time is told to the one who chooses.

        Several answers to one request are at work together, and its time is that of the last.
        """
        prompts = getattr(body, "prompt", None)
        several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
        wanted = 1 if body.n is None else body.n
        if wanted < 1:
            raise HTTPException(400, f"n: {wanted} answers cannot be given; 1 or more")
        count = (len(prompts) if several and prompts is not None else 1) * wanted
        self._few(count, "answers")
        load = TRAFFIC.at_work + count - 1
        body.model = self._model(body.model, load)
        with ExitStack() as stack:
            stack.enter_context(TRAFFIC.more(count - 1, self.run["max_waiting"]))
            stack.enter_context(self._timing(body.model, load))
            response = await answer(body, request)
            response.headers[MODEL_HEADER] = body.model
            if isinstance(response, StreamingResponse):
                response.body_iterator = Held(response.body_iterator, stack.pop_all(), _failure_in)
            return response

    def _timing(self, model: str, load: int) -> AbstractContextManager[None]:
        return nullcontext() if self.chooser is None else self.chooser.timing(model, load)

    async def _answer(self, model: str, wanted: Wanted) -> str:
        body = CompletionRequest(
            model=model,
            prompt=list(wanted.tokens),
            max_tokens=wanted.max_new_tokens,
            temperature=0,
            stop_token_ids=sorted(self.rule.stop),
            ignore_eos=True,  # the end tokens are among the stops
            return_token_ids=True,
        )
        async for found in self._get_response(body=body, call_method="completions"):
            if isinstance(found, ErrorResponse) or not hasattr(found, "choices"):
                raise OpenAIHTTPException(found.error.code, found.error.message, found.error.type)
            tokens, finish = self.rule.cut(found.choices[0].token_ids)
            return to_output(self.tokenizer, tokens, finish, self.prompt.newline).text
        raise HTTPException(502, f"model {model} gave no answer")


def side_by_side(names: list[str]) -> list[str]:
    """The two models that the page shows at first: the unpruned one and the best pruned one, where they are served."""
    first = "baseline" if "baseline" in names else names[0]
    others = [name for name in names if name != first] or names
    kinds = {kind_of(whole_of(name)): name for name in sorted(others, key=lambda name: whole_of(name) == name)}
    return [first, kinds.get("healed") or kinds.get("pruned") or others[-1]]


async def all_or_none(tasks: Sequence[Coroutine[Any, Any, str]]) -> list[str]:
    """What each gives; when one fails, the others are given up."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


def _is_failure(error: Exception) -> bool:
    """Whether it is the endpoint's own: what a client did wrong, and what is too much, says nothing of a model."""
    if isinstance(error, (TooManyError, VLLMClientError)):
        return False
    if isinstance(error, (HTTPException, OpenAIHTTPException)):
        return error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return int(get_response_for_error(error, "").error.code) >= HTTPStatus.INTERNAL_SERVER_ERROR


def _failure_in(part: Any) -> Exception | None:
    """What a part of a stream tells of, as the error it would have been outside of one."""
    if (told := told_error(part)) is None:
        return None
    code = told.get("code")
    status = code if isinstance(code, int) and code >= HTTPStatus.BAD_REQUEST else HTTPStatus.INTERNAL_SERVER_ERROR
    return OpenAIHTTPException(int(status), str(told.get("message")), str(told.get("type")))


async def tell_error(request: Request, error: Exception) -> JSONResponse:
    """An error in the form OpenAI's clients read: what is wrong with the request, or that it is not the request."""
    kind = "invalid_request_error"
    if isinstance(error, RequestValidationError):
        first = error.errors()[0] if error.errors() else {}
        where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
        status, said = 400, f"{where}: {first.get('msg', 'not understood')}" if where else str(first.get("msg"))
    elif isinstance(error, HTTPException):
        status, said = error.status_code, str(error.detail)
    elif isinstance(error, TooManyError):
        status, said = 429, f"{error}; come again in {RETRY_AFTER_S} s"
    elif isinstance(error, OpenAIHTTPException):
        status, said, kind = error.status_code, error.message, error.type
    elif isinstance(error, VLLMClientError):  # what vLLM's own checks of a request say
        status, said = 400, str(error)
    else:
        found = get_response_for_error(error, request.headers.get("x-request-id", "")).error
        status, said, kind = int(found.code), found.message, found.type
        if status >= 500:
            said = "the endpoint failed at this request; its log says why"
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    return JSONResponse({"error": {"message": said, "type": kind, "code": status}}, status, headers)
