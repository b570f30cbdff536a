"""Chat templates: Jinja programs of a tokenizer that format messages as one text."""

import datetime
import functools
import json

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.rows import UnusableError


class Generation(Extension):  # {% generation %} marks the model's turns; it is ignored
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise UnusableError(f"the chat template refuses the messages: {message}")


ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
ENVIRONMENT.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
ENVIRONMENT.globals["raise_exception"] = raise_exception
ENVIRONMENT.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
compile_template = functools.lru_cache(maxsize=8)(ENVIRONMENT.from_string)


def render_template(source: str, messages: list[dict], add_generation_prompt: bool, names) -> str:
    """Renders a chat template as transformers does; `names` holds bos_token, eos_token and so on.
    Raises UnusableError if the template refuses the messages and ValueError if it crashes."""
    values = {"messages": messages, "tools": None, "documents": None, **names}
    try:
        return compile_template(source).render(values, add_generation_prompt=add_generation_prompt)
    except UnusableError:
        raise
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"the chat template fails: {str(error) or type(error).__name__}") from None
