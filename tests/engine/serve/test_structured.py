import json

import pytest

import anabranch
from anabranch.serve.structured import MAX_CHARS, StructuredOutput, from_response_format

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


def test_a_schema_is_the_same_as_mapping_and_as_text():
    assert StructuredOutput(json_schema=SCHEMA).source == StructuredOutput(json_schema=json.dumps(SCHEMA)).source
    kind, text = StructuredOutput(json_schema=SCHEMA).source
    assert (kind, json.loads(text)) == ("json_schema", SCHEMA)
    assert list(json.loads(text)["properties"]) == ["b", "a"]  # the order that an output keeps


def test_every_form_has_a_source_of_its_own():
    forms = [
        StructuredOutput(json_schema=SCHEMA), StructuredOutput(json_object=True), StructuredOutput(regex="a"),
        StructuredOutput(choice=("a",)), StructuredOutput(grammar="a"), StructuredOutput(choice=("a", "b")),
    ]  # fmt: skip
    assert len({form.source for form in forms}) == len(forms)
    assert StructuredOutput(choice=["a"]).source == StructuredOutput(choice=("a",)).source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of .* got none"),
        ({"regex": "a", "choice": ("a",)}, r"exactly one of .* got \['regex', 'choice'\]"),
        ({"regex": ""}, "regex must be a text that is not empty"),
        ({"regex": 3}, "regex must be a text"),
        ({"grammar": b"x"}, "grammar must be a text"),
        ({"grammar": "start: A\nA: ~/a/"}, "must not contain '~'"),
        ({"choice": ()}, "choice must be a list of texts"),
        ({"choice": "yes"}, "choice must be a list of texts"),
        ({"choice": ("a", "")}, "choice must be a list of texts that are not empty"),
        ({"choice": ("a", 1)}, "choice must be a list of texts"),
        ({"json_object": "yes"}, "json_object must be True or False, got 'yes'"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[" * 20_000}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, "json_schema must be an object, got list"),
        ({"json_schema": ["a"]}, "json_schema must be an object, got list"),
        ({"json_schema": {"const": {1, 2}}}, "cannot be written as JSON"),
        ({"json_schema": {"const": 2**53 + 1}}, r"integers in json_schema must lie in \[-2\*\*53, 2\*\*53\], got 9007"),
        ({"json_schema": {"items": [{"minimum": -(10**30)}]}}, "got -1000000"),
        ({"json_schema": {"minimum": float("nan")}}, "cannot be written as JSON"),
        ({"json_schema": {"const": "x" * MAX_CHARS}}, f"json_schema must have at most {MAX_CHARS} characters"),
        ({"json_schema": " " * (MAX_CHARS + 1)}, f"json_schema must have at most {MAX_CHARS} characters"),
        ({"regex": "x" * (MAX_CHARS + 1)}, f"regex must have at most {MAX_CHARS} characters, got {MAX_CHARS + 1}"),
        ({"choice": ("x" * MAX_CHARS,)}, f"choice must have at most {MAX_CHARS} characters"),
        ({"grammar": "x" * (MAX_CHARS + 1)}, f"grammar must have at most {MAX_CHARS} characters"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutput(**fields)


def test_a_schema_that_contains_itself_is_refused():
    schema = {}
    schema["items"] = schema
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        StructuredOutput(json_schema=schema)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({}, None),
        ({"guided_regex": None, "json_object": False}, None),
        ({"type": "json_object"}, StructuredOutput(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
            StructuredOutput(json_schema=SCHEMA),
        ),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        ({"regex": "a+"}, StructuredOutput(regex="a+")),
        ({"choice": ["a", "b"]}, StructuredOutput(choice=["a", "b"])),
        ({"json": SCHEMA}, StructuredOutput(json_schema=SCHEMA)),
        ({"json_object": True, "regex": None}, StructuredOutput(json_object=True)),
        ({"grammar": 'start: "a"'}, StructuredOutput(grammar='start: "a"')),
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"guided_choice": ["a"]}, StructuredOutput(choice=["a"])),
        ({"guided_json": json.dumps(SCHEMA)}, StructuredOutput(json_schema=json.dumps(SCHEMA))),
    ],
)
def test_requests_over_http(form, expected):
    assert from_response_format(form) == expected


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("json", "must be an object, got 'json'"),
        ({"type": "yaml"}, "must be 'text', 'json_object' or 'json_schema', got 'yaml'"),
        ({"type": None}, "got None"),
        ({"type": "json_schema"}, 'must be an object with a "schema"'),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, 'must be an object with a "schema"'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}, 'must be an object with a "schema"'),
        ({"type": "json_schema", "json_schema": {"schema": {}, "shema": 1}}, "unknown key 'shema'"),
        ({"regexp": "a"}, "unknown key 'regexp' in structured_outputs"),
        ({"regex": "a", "choice": ["a"]}, "give at most one of"),
        ({"choice": "a"}, "choice must be a list of texts"),
        ({"guided_json": 3}, "json_schema must be an object, got int"),
    ],
)
def test_requests_over_http_that_make_no_sense(form, message):
    with pytest.raises(ValueError, match=message):
        from_response_format(form)


def test_it_is_part_of_the_front_door():
    assert anabranch.StructuredOutput is StructuredOutput
    with pytest.raises(ValueError, match="structured must be a StructuredOutput, or None, got 'a'"):
        anabranch.SamplingParams(structured="a")
