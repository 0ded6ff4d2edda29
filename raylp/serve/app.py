"""The endpoint as a Ray Serve application: what `raylp serve` runs, and what `serve deploy` builds from a file."""

from typing import Any

from raylp.serve.gate import Gate, TooManyError
from raylp.serve.ingress import ROUTES, RunIngress, tell_error


def build(args: dict[str, Any]) -> Any:
    """One vLLM deployment for each model, and one ingress before them all.

    `args`: plain data, as `raylp serve --dry-run` prints it: `llm_configs` of Ray's LLMConfig, `ingress` with the
    options of its deployment, `gate` with the arguments of `raylp.serve.gate.Gate`, `run` as `RunIngress` takes it.
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from ray import serve
    from ray.exceptions import RayError
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, to_model_metadata
    from ray.serve.llm import LLMConfig, build_llm_deployment
    from ray.serve.llm.ingress import make_fastapi_ingress
    from starlette.exceptions import HTTPException
    from vllm.exceptions import VLLMClientError

    configs = [LLMConfig(**config) for config in args["llm_configs"]]
    # Not Ray's own application: that lets any page on the web ask the endpoint (CORS), and counts nothing.
    app = FastAPI(title="raylp", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, **args["gate"])
    told = (HTTPException, RequestValidationError, OpenAIHTTPException, RayError, TooManyError, VLLMClientError)
    for kind in (*told, Exception):
        app.add_exception_handler(kind, tell_error)
    ingress = make_fastapi_ingress(RunIngress, endpoint_map=ROUTES, app=app)
    return serve.deployment(ingress, **args["ingress"]).bind(
        llm_deployments={config.model_id: build_llm_deployment(config) for config in configs},
        model_cards={config.model_id: to_model_metadata(config.model_id, config) for config in configs},
        run=args["run"],
    )
