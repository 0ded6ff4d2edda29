"""Ray Data's stage with vLLM, asked for whole answers. Imported only where a teacher works, as it imports Ray's own."""

from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF


class WholeAnswers(vLLMEngineStageUDF):
    """Ray's own, which reads only what is finished; by default vLLM makes an answer anew for each of its tokens."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        from vllm.sampling_params import RequestOutputKind

        prepare = self.llm._prepare_llm_request

        async def prepare_whole(row: dict[str, Any]) -> Any:
            request = await prepare(row)
            request.params.output_kind = RequestOutputKind.FINAL_ONLY
            return request

        self.llm._prepare_llm_request = prepare_whole
