"""Tools that a model may call: their schemas, and the calls in what it writes.

tools = read_tools([get_weather])
parser = ToolFormat.of(template.text).parser(tools, prompt=prompt)
piece = parser.feed(text)          # content, reasoning, calls
piece = parser.flush()
result = tools[0].call(piece.calls[0].arguments)
"""

from .calls import CallDelta, CallError, ParsedPiece, ToolCall
from .formats import FORMATS, ToolFormat
from .parser import CallParser
from .schema import Tool, as_text, read_tools

__all__ = [
    "FORMATS",
    "CallDelta",
    "CallError",
    "CallParser",
    "ParsedPiece",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "as_text",
    "read_tools",
]
