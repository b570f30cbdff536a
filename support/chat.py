"""Chat templates: jinja2 programs that come with a tokenizer and write messages as one text."""

import datetime
import functools
import json

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.rows import UnusableError


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model writes. Rendering ignores it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(source: str):
    def raise_exception(message):
        raise UnusableError(f"the chat template refuses the messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def render_template(
    source: str, messages: list[dict], add_generation_prompt: bool, names: dict[str, str]
) -> str:
    """Renders a chat template as transformers does (utils/chat_template_utils.py). `names` holds
    bos_token, eos_token and so on. Raises UnusableError if the template refuses the messages and
    ValueError if it fails."""
    values = {"messages": messages, "tools": None, "documents": None, **names}
    try:
        return _compile(source).render(values, add_generation_prompt=add_generation_prompt)
    except UnusableError:
        raise
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"the chat template fails: {str(error) or type(error).__name__}") from None
