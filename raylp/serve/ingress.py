"""What answers at the endpoint: OpenAI's paths, sentences to translate, a page, health and metrics.

Runs in a process of its own behind Ray Serve's proxy, before the engines. Imports Ray's serving, so that only what
serves imports this.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.llm._internal.serve.utils.server_utils import get_response_for_error
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, ErrorResponse

from raylp.data.prompt import Prompt
from raylp.errors import UserError
from raylp.generate.base import Request as Wanted
from raylp.generate.base import StopRule, stop_rule, to_output
from raylp.generate.translate import fit
from raylp.models.load import load_tokenizer, read_config, read_generation_config
from raylp.names import kind_of
from raylp.serve.gate import TRAFFIC
from raylp.serve.slo import AUTO, Chooser, read_objective

MODEL_HEADER = "x-raylp-model"
PAGE = Path(__file__).parent / "page.html"
ROUTES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
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
    """`run`: `prompt`, `pairs`, `models` ({name: {"path", "layers"}}), `slo` or None, `max_sentences`, `max_model_len`,
    `keys`: whether one must be sent.

    The rest as Ray's own.
    """

    def __init__(self, llm_deployments: dict[str, Any], model_cards: dict[str, Any], *, run: dict[str, Any]) -> None:
        super().__init__(llm_deployments, model_cards)
        self.run = run
        self.prompt = Prompt.model_validate(run["prompt"])
        self.chooser: Chooser | None = None
        if run["slo"]:
            models: dict[str, dict[str, Any]] = run["models"]
            deepest_first = sorted(models, key=lambda name: -models[name]["layers"])
            self.chooser = Chooser(deepest_first, read_objective(run["slo"]))

    @cached_property
    def tokenizer(self) -> Any:
        """The models of a run share it: they are cut from one."""
        return load_tokenizer(self._path)

    @cached_property
    def rule(self) -> StopRule:
        configs = [read_config(self._path).get_text_config(decoder=True), read_generation_config(self._path)]
        return stop_rule(self.tokenizer, configs, self.prompt.newline)

    @property
    def _path(self) -> Path:
        return Path(next(iter(self.run["models"].values()))["path"])

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions, of a model of the run or of `auto`."""
        return await self._timed(super().completions, body, request)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """OpenAI's chat completions, of a model of the run or of `auto`."""
        return await self._timed(super().chat, body, request)

    async def translate(self, body: Sentences, request: Request) -> Response:
        """One translation for each sentence, in order, by the run's prompt; a blank one for a blank one."""
        if len(body.sentences) > self.run["max_sentences"]:
            said = f"{len(body.sentences)} sentences, {self.run['max_sentences']} at a time are the most"
            raise HTTPException(413, said)
        pair = self._pair(body.pair)
        load = TRAFFIC.at_work
        model = await self._get_model_id(self._choose(body.model, load))
        started = time.perf_counter()
        room = self.run["max_model_len"]
        try:
            fitted = [fit(self.tokenizer, self.prompt, " ".join(s.split()), pair, room) for s in body.sentences]
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        wanted = [(place, one.request) for place, one in enumerate(fitted) if body.sentences[place].strip()]
        made = await asyncio.gather(*(self._answer(model, one) for _, one in wanted))
        texts = [""] * len(body.sentences)
        for (place, _), text in zip(wanted, made, strict=True):
            texts[place] = text
        ms = (time.perf_counter() - started) * 1000
        if self.chooser is not None:
            self.chooser.done(model, load, ms)
        cut = [place for place, one in enumerate(fitted) if one.cut]
        answer = {"model": model, "pair": pair, "translations": texts, "cut": cut, "ms": round(ms, 1)}
        return JSONResponse(answer, headers={MODEL_HEADER: model})

    async def models(self) -> Any:
        """What may be asked for: the models, and `auto` where there is an objective to choose by."""
        found = await super().models()
        if self.chooser is not None:
            found.data.append(found.data[0].model_copy(update={"id": AUTO, "metadata": {"slo": self.run["slo"]}}))
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
        # In a script, `</` would end it.
        text = json.dumps(known).replace("</", "<\\/")
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("{{ known }}", text))

    async def health(self) -> JSONResponse:
        """200 when every model answers, 503 with the state of each when not."""
        from ray import serve

        status = await asyncio.to_thread(serve.status)
        found = next((a for a in status.applications.values() if a.status == "RUNNING"), None)
        ready = found is not None and not TRAFFIC.draining
        states = {
            name: str(state.status.value) for a in status.applications.values() for name, state in a.deployments.items()
        }
        content = {"status": "ok" if ready else "draining" if TRAFFIC.draining else "not ready", "deployments": states}
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

    def _choose(self, wanted: str | None, load: int) -> str | None:
        return self.chooser.choose(load) if wanted == AUTO and self.chooser is not None else wanted

    async def _timed(
        self, answer: Callable[[Any, Request], Awaitable[Response]], body: Any, request: Request
    ) -> Response:
        """The answer of a model, which `auto` is replaced by; its time is told to the one who chooses."""
        load = TRAFFIC.at_work
        body.model = self._choose(body.model, load)
        started = time.perf_counter()

        def done() -> None:
            if self.chooser is not None and body.model is not None:
                self.chooser.done(body.model, load, (time.perf_counter() - started) * 1000)

        response = await answer(body, request)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _then(response.body_iterator, done)
        else:
            done()
        if body.model is not None:
            response.headers[MODEL_HEADER] = body.model
        return response

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
    kinds = {kind_of(name): name for name in others}
    return [first, kinds.get("healed") or kinds.get("pruned") or others[-1]]


async def _then(parts: AsyncIterable[Any], done: Callable[[], None]) -> AsyncIterator[Any]:
    async for part in parts:
        yield part
    done()


async def tell_error(request: Request, error: Exception) -> JSONResponse:
    """An error in the form OpenAI's clients read: what is wrong with the request, or that it is not the request."""
    kind = "invalid_request_error"
    if isinstance(error, RequestValidationError):
        first = error.errors()[0] if error.errors() else {}
        where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
        status, said = 400, f"{where}: {first.get('msg', 'not understood')}" if where else str(first.get("msg"))
    elif isinstance(error, HTTPException):
        status, said = error.status_code, str(error.detail)
    elif isinstance(error, OpenAIHTTPException):
        status, said, kind = error.status_code, error.message, error.type
    else:
        found = get_response_for_error(error, request.headers.get("x-request-id", "")).error
        status, said, kind = int(found.code), found.message, found.type
        if status >= 500:
            said = "the endpoint failed at this request; its log says why"
    return JSONResponse({"error": {"message": said, "type": kind, "code": status}}, status)
