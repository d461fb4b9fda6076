"""Stream from a FastAPI handler; whoever disconnects stops the generation: MODEL=m.gguf uvicorn fastapi_stream:app"""

import os
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import minerva_native as mn

app = FastAPI()
llm = mn.LLM(os.environ.get("MODEL", mn.DEMO_PATH), n_ctx=1024)


@app.get("/stream")
async def stream(prompt: str, max_tokens: int = 100) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        async with llm.astream(prompt, max_tokens=max_tokens) as chunks:  # leaving it stops the request
            async for chunk in chunks:
                yield chunk.text

    return StreamingResponse(pieces(), media_type="text/plain")
