"""The printed forms of syntax trees and expanded words, for `pybuild parse --json` and `parse --words`."""

from __future__ import annotations

import json
from typing import Any

from builder.errors import ParseError
from builder.frontend.heredoc import Heredoc
from builder.frontend.parser import Node, SyntaxTree
from builder.frontend.words import expand_word, expand_words


def to_json(tree: SyntaxTree) -> list[dict[str, Any]]:
    """The instructions of a tree as JSON values; ONBUILD's argument is such an object itself."""
    return [_node(node) for node in tree.nodes]


def _node(node: Node) -> dict[str, Any]:
    args: list[Any] = [_node(node.child)] if node.child else list(node.args)
    result: dict[str, Any] = {"instruction": node.instruction, "flags": list(node.flags), "args": args}
    if node.heredocs:
        result["heredocs"] = [_heredoc(heredoc) for heredoc in node.heredocs]
    return result


def _heredoc(heredoc: Heredoc) -> dict[str, Any]:
    return {
        "name": heredoc.name,
        "content": heredoc.content,
        "expand": heredoc.expand,
        "chomp": heredoc.chomp,
        "file_descriptor": heredoc.file_descriptor,
    }


def words_json(line: str) -> str:
    """Answer one line of `parse --words`: `{"word": W, "env": {...}, "mode": "word"|"words"}`, `escape` if not `\\`.

    A string, a list, or `{"error": message}`: a malformed request is answered so too.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as e:
        return _answer({"error": f"not JSON: {e}"})
    if not isinstance(request, dict) or not isinstance(request.get("word"), str):
        return _answer({"error": 'expected an object with a "word"'})
    env, mode, escape = request.get("env", {}), request.get("mode", "word"), request.get("escape", "\\")
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        return _answer({"error": '"env" must map names to strings'})
    if mode not in ("word", "words") or escape not in ("\\", "`"):
        return _answer({"error": '"mode" is word or words, "escape" is \\ or `'})
    try:
        expand = expand_words if mode == "words" else expand_word
        return _answer(expand(request["word"], env, escape))
    except ParseError as e:
        return _answer({"error": e.message})


def _answer(value: Any) -> str:
    return json.dumps(value)
