"""What may be asked of the page: its events and endpoints, with as many values as they take, and of the right kinds.

The library behind would try to use anything, and fail with the values in its error.
"""

import math
from collections.abc import Callable, Mapping

from .limits import RequestRefused


class Calls:
    """The calls that a page takes.

    Args:
        config: of the page, as `gr.Blocks.get_config_file` returns it.
        described: its endpoints, as `gr.Blocks.get_api_info` returns them.
    """

    def __init__(self, config: Mapping, described: Mapping):
        components = {one["id"]: one for one in config["components"]}
        self._kinds: dict[int, list[tuple[str, str, Callable[[object], bool]]]] = {}
        for call in config["dependencies"]:
            endpoint = described["named_endpoints"].get(f"/{call['api_name']}")
            if endpoint is not None:
                kinds = [_parameter(parameter) for parameter in endpoint["parameters"]]
            else:
                kinds = [_input(components[i]) for i in call["inputs"]]
            self._kinds[call["id"]] = kinds

    def check(self, message: Mapping) -> None:
        """Looks at a message that asks for a call.

        Raises:
            RequestRefused: there is no such call, or its values are too few, too many, or of another kind.
        """
        number, values = message.get("fn_index"), message.get("data")
        # True and 1.0 would be found as 1.
        kinds = self._kinds.get(number) if type(number) is int else None
        if kinds is None:
            raise RequestRefused("this page has no such event: reload it")
        if not isinstance(values, list) or len(values) != len(kinds):
            found = len(values) if isinstance(values, list) else "no list"
            raise RequestRefused(f"expected {len(kinds)} values, got {found}")
        for value, (name, expected, fits) in zip(values, kinds, strict=True):
            if not fits(value):
                raise RequestRefused(f"{name}: expected {expected}, got {_kind_of(value)}")
        trigger = message.get("trigger_id")
        if trigger is not None and type(trigger) is not int:
            raise RequestRefused(f"trigger_id: expected a whole number, got {_kind_of(trigger)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_box(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    files = value.get("files", [])
    return isinstance(value.get("text") or "", str) and (
        files is None or (isinstance(files, list) and all(_is_file(file) for file in files))
    )


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str)


# What is expected of a value that is not left out, by the kinds of the endpoints' description.
_OF_PARAMETERS = {
    "string": ("text", lambda value: isinstance(value, str)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "number": ("a number", _is_number),
    "integer": ("a whole number", lambda value: type(value) is int),
    "array": ("a list of files", lambda value: isinstance(value, list) and all(_is_file(file) for file in value)),
}
# Values that their endpoints judge, because gradio's client shows its user what an endpoint says, but not what is said
# here. Files among them are looked at by the gate in any case.
_JUDGED_LATER = ("pictures", "picture")
# What is expected by the kinds of the page's components.
_OF_INPUTS = {
    "multimodaltextbox": ("text with files", _is_box),
    "textbox": ("text", lambda value: isinstance(value, str)),
    "checkbox": ("true or false", lambda value: isinstance(value, bool)),
    "radio": ("a whole number", lambda value: type(value) is int),
    "image": ("a file", _is_file),
}


def _parameter(parameter: Mapping) -> tuple[str, str, Callable[[object], bool]]:
    expected, fits = _OF_PARAMETERS[parameter["type"]["type"]]
    if parameter["parameter_name"] in _JUDGED_LATER:
        return parameter["parameter_name"], expected, lambda value: True
    missing = parameter["parameter_has_default"]
    return parameter["parameter_name"], expected, lambda value: (missing and value is None) or fits(value)


def _input(component: Mapping) -> tuple[str, str, Callable[[object], bool]]:
    kind, about = component["type"], component["props"]
    name = about.get("label") or kind
    if kind == "slider":
        least, most = about["minimum"], about["maximum"]
        return name, f"a number from {least} to {most}", lambda value: _is_number(value) and least <= value <= most
    expected, fits = _OF_INPUTS[kind]
    # A component that is empty sends nothing, but a switch is on or off.
    return name, expected, lambda value: (value is None and kind != "checkbox") or fits(value)


def _kind_of(value: object) -> str:
    """What a value is, without the value."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return {str: "text", list: "a list", dict: "an object"}[type(value)]
