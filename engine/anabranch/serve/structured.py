"""What an output must look like: a JSON schema, any JSON object, a regular expression, a choice, a grammar.

Here is only the wish, with its limits: it comes from outside. `grammar.py` turns it into the tokens that are allowed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["json_schema", "regex", "choice", "grammar"]
MAX_CHARS = 1 << 16  # of a specification: the slowest schema of that length took 0.6 s to compile
EXTRAS = {  # vLLM's names, and ours
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
SCHEMA_KEYS = ("name", "description", "schema", "strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of an output; exactly one of the fields is given.

    json_schema  JSON that satisfies this schema (draft 2020-12), a mapping or its text. Properties come in the schema's
                 order. Between tokens of JSON there is at most a space, or a line break and 16 characters of indent.
                 What the compiler does not support (`not`, external `$ref`, unknown `format`) is a ValueError
    json_object  any JSON object
    regex        the whole output matches, in Rust's syntax: no look-around, no back-references; ^ and $ may stand at
                 the ends
    choice       the output is one of these texts
    grammar      a context-free grammar in llguidance's dialect of Lark, from the rule `start`. `~` is not allowed in
                 it, not even inside a string (where \\x7e says the same): negation takes time without bound

    ValueError if there is not exactly one, or it is longer than MAX_CHARS characters. Whether it can be compiled is
    found out when a request brings it.
    """

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in EXTRAS.values() if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {list(EXTRAS.values())}, got {given or 'none'}")
        kind, text = self.source
        if len(text) > MAX_CHARS:
            raise ValueError(f"{kind} must have at most {MAX_CHARS} characters, got {len(text)}")

    @property
    def source(self) -> tuple[Kind, str]:
        """The kind and its text: what distinguishes one specification from another."""
        if self.json_object is not False:
            if self.json_object is not True:
                raise ValueError(f"json_object must be True or False, got {self.json_object!r}")
            return "json_schema", '{"type": "object"}'
        if self.json_schema is not None:
            return "json_schema", _schema_text(self.json_schema)
        if self.choice is not None:
            return "choice", _choice_text(self.choice)
        kind: Kind = "grammar" if self.regex is None else "regex"
        text = self.grammar if self.regex is None else self.regex
        if not isinstance(text, str) or not text:
            raise ValueError(f"{kind} must be a text that is not empty, got {text!r}")
        if kind == "grammar" and "~" in text:
            raise ValueError("grammar must not contain '~' (inside strings write \\x7e, for repetition {m,n})")
        return kind, text


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        if len(schema) > MAX_CHARS:
            raise ValueError(f"json_schema must have at most {MAX_CHARS} characters, got {len(schema)}")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json_schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"json_schema must be an object, got {type(schema).__name__}")
    try:
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema cannot be written as JSON: {error}") from None
    json.loads(text, parse_int=_exact)
    return text


def _exact(digits: str) -> None:
    """The compiler reads integers as float64."""
    if len(digits) > 17 or abs(int(digits)) > 2**53:
        raise ValueError(f"integers in json_schema must lie in [-2**53, 2**53], got {digits[:40]}")


def _choice_text(choice: object) -> str:
    texts = choice if isinstance(choice, list | tuple) else ()
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"choice must be a list of texts that are not empty, got {choice!r}")
    return json.dumps(texts, ensure_ascii=False)


def from_response_format(form: Mapping[str, Any]) -> StructuredOutput | None:
    """What a request over HTTP asks for; None if it is free text.

    form  OpenAI's `response_format`: {"type": "text"}, {"type": "json_object"} or {"type": "json_schema",
          "json_schema": {"name": ..., "schema": {...}, "strict": ...}}; or vLLM's `structured_outputs`, {"regex": ...},
          {"choice": [...]}, {"json": {...}}, {"json_object": true} or {"grammar": ...}, whose keys may also be
          written as it wrote them before: {"guided_regex": ...}

    A schema is always enforced, whatever `strict` says. ValueError for anything else.
    """
    if not isinstance(form, Mapping):
        raise ValueError(f"a response format must be an object, got {form!r}")
    if "type" not in form:
        return _from_extras(form)
    kind = form["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    if kind != "json_schema":
        raise ValueError(f"response_format.type must be 'text', 'json_object' or 'json_schema', got {kind!r}")
    inner = form.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise ValueError('response_format.json_schema must be an object with a "schema", which is an object')
    _refuse_unknown("response_format.json_schema", inner, SCHEMA_KEYS)
    return StructuredOutput(json_schema=inner["schema"])


def _from_extras(form: Mapping[str, Any]) -> StructuredOutput | None:
    names = {prefix + name: ours for name, ours in EXTRAS.items() for prefix in ("", "guided_")}
    _refuse_unknown("structured_outputs", form, tuple(names))
    given = [(names[key], value) for key, value in form.items() if value is not None and value is not False]
    if len(given) > 1:
        raise ValueError(f"give at most one of {list(EXTRAS)}, got {sorted(form)}")
    return StructuredOutput(**dict(given)) if given else None


def _refuse_unknown(where: str, form: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(form) - set(known))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in {where}; it may have {list(known)}")
