"""A chat template is code from strangers: it renders as transformers would render it, and it is stopped in time."""

import os
import re
import sys
import threading
import time

import pytest
from codec_fixtures import TEMPLATES
from jinja2 import TemplateError

from tunekit import ConfigError, DataError
from tunekit.core.data import template as module
from tunekit.core.data.codec import Codec
from tunekit.core.data.template import Template
from tunekit.testing import CHATML, tiny_tokenizer

USER = [{"role": "user", "content": "x"}]
CALL = {"function": {"name": "f", "arguments": {"a": 1, "b": ["ü", None, 1.5]}}}
TALKS = {
    "one question": USER,
    "two turns": [*USER, {"role": "assistant", "content": " y\n"}, *USER, {"role": "assistant", "content": "ü <z>"}],
    "system": [{"role": "system", "content": "s"}, *USER, {"role": "assistant", "content": "'&\"\u2028"}],
    "tools": [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "reasoning": [*USER, {"role": "assistant", "content": "y", "reasoning": "because"}],
}
EXTRAS = {
    "namespace": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set a = 1 %}{% endgeneration %}\n{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ dict(a=1) | tojson(separators=(',', ':')) }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{{ 'content' in m }}{% endfor %}",
    "absent": "{{ documents }}{{ tools }}{{ eos_token }}{{ nothing }}",
}
STOPPED = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" * 9,
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "a number without end": "{{ 10 ** (10 ** 10) }}",
    "a text without end": "{{ 'a' * 10 ** 12 }}",
    "a width without end": "{{ '%999999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "recursion that branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
REFUSED = {
    "a range that is too long": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "recursion without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "globals": ("{{ lipsum.__globals__['os'].system('false') }}", "unsafe"),
    "init": ("{{ cycler.__init__.__globals__ }}", "unsafe|undefined"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "attributes": ("{{ ('' | attr('__class__')).__mro__ }}", "unsafe|undefined"),
    "formats": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe|undefined"),
    "changes": ("{{ messages.append(1) }}", "unsafe"),
    "private names": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "no name for an attribute"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "no jinja": ("{% for m in %}", "Expected an expression"),
}


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("text", [*TEMPLATES.values(), *EXTRAS.values()], ids=[*TEMPLATES, *EXTRAS])
@pytest.mark.parametrize("begin_answer", [False, True])
def test_a_template_renders_as_transformers_renders_it(text, talk, begin_answer):
    tokenizer = tiny_tokenizer(begin=True)
    ours = Template(text, tokenizer.special_tokens_map).render(talk, None, [(len(talk), begin_answer)])[0]
    arguments = {"chat_template": text, "tokenize": False, "add_generation_prompt": begin_answer}
    if isinstance(ours, str):
        assert ours == tokenizer.apply_chat_template(talk, **arguments)
    else:
        with pytest.raises(
            (TemplateError, TypeError), match=re.escape(str(ours).split(": ", 1)[1][: -len(" (messages)")])
        ):
            tokenizer.apply_chat_template(talk, **arguments)


@pytest.mark.parametrize("text", STOPPED.values(), ids=STOPPED)
def test_a_template_that_goes_on_and_on_is_stopped_in_time_and_the_next_one_renders(text):
    """Trap X4. On another thread than the main one, where no signal would help."""
    caught = []

    def render():
        began = time.monotonic()
        says = r"was stopped: it (took more than 0\.5 s|needs too much memory|ended)"
        with pytest.raises(ConfigError, match=says) as info:
            Template(text, {}, seconds=0.5).render(USER, None, [(1, False)])
        caught.append((info.value, time.monotonic() - began))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    [(error, seconds)] = caught
    assert seconds < 5
    assert repr(text[:60])[1:-1] in str(error).replace("\\'", "'") or text[:20] in str(error)
    assert Template("{{ 1 + 1 }}", {}).render(USER, None, [(1, False)]) == ["2"]


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_reaches_out_of_the_sandbox_is_refused(text, says):
    """Trap X4."""
    [error] = Template(text, {}).render(USER, None, [(1, False)])
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=says):
        raise error


def test_a_template_that_goes_on_for_one_row_of_many_is_stopped_at_that_row():
    text = "{% if 'now' in messages[0].content %}" + STOPPED["nested loops"] + "{% endif %}{{ messages[0].content }}"
    codec = Codec(tiny_tokenizer(template=text))
    codec._template.seconds = 0.5
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("a", "b", "now", "c")]
    ahead = codec.ahead(rows)
    for row in rows[:2]:
        assert next(ahead) is row
        assert codec.decode(codec.prompt(row["messages"])) == row["messages"][0]["content"]
    with pytest.raises(ConfigError, match=r"Pipeline\.template: .* was stopped"):
        codec.prompt(next(ahead)["messages"])
    assert codec.decode(codec.prompt(next(ahead)["messages"])) == "c"


def test_threads_share_the_process_and_none_gets_the_answer_of_another():
    wrong = []

    def render(number):
        for at in range(30):
            message = {"role": "user", "content": f"{number} {at}"}
            if Template("{{ messages[0].content }}", {}).render([message], None, [(1, False)]) != [f"{number} {at}"]:
                wrong.append((number, at))

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_interrupted_question_does_not_leave_its_answer_to_the_next(monkeypatch):
    helper = module._helper()
    template = Template("{{ messages[0].content }}", {})
    template.render(USER, None, [(1, False)])
    process = helper._process

    class Interrupted:
        """The pipe to the process, with the user at control-C while an answer is awaited."""

        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            process_stdout.close()

    process_stdout, process.stdout = process.stdout, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "lost"}], None, [(1, False)])
    assert process.poll() is not None
    assert template.render(USER, None, [(1, False)]) == ["x"]


def test_the_process_ends_when_it_is_idle_and_starts_again(monkeypatch):
    monkeypatch.setattr(module, "IDLE", 0.3)
    helper = module.Helper()
    template = Template("{{ messages[0].content }}", {})
    row = module._row(USER, None, [(1, False)])
    assert helper.ask([row], template) == {"texts": [[["x", None]]]}
    helper._process.wait(timeout=10)
    assert helper.ask([row], template) == {"texts": [[["x", None]]]}
    helper.stop()
    assert helper._process is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_a_helper_of_its_own():
    template = Template("{{ messages[0].content }}", {})
    template.render(USER, None, [(1, False)])
    ours = module._helper()._process.pid
    code = os.fork()
    if code == 0:
        same = template.render(USER, None, [(1, False)]) == ["x"] and module._helper()._process.pid != ours
        module._helper().stop()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 0
    assert template.render(USER, None, [(1, False)]) == ["x"]
    assert module._helper()._process.pid == ours


def test_the_day_in_a_template_is_the_same_every_day():
    """Else no run could be resumed on the next one, and no encoded row be kept."""
    text = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert Template(text, {}).render(USER, None, [(1, False)]) == ["26 Jul 2024"]


def test_where_no_process_can_be_started_the_error_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ConfigError, match="cannot start the process that renders chat templates"):
        module.Helper().ask([], Template(CHATML, {}))


def test_a_process_that_does_not_come_up_is_an_error_and_no_wait(monkeypatch):
    monkeypatch.setattr(module, "__file__", "/no/such/folder/template.py")
    with pytest.raises(ConfigError, match="does not start"):
        module.Helper().ask([], Template(CHATML, {}))
