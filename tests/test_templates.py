"""templates.py against transformers' own rendering, and templates that mean harm."""
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import templates
from conftest import ROOT
from templates import TemplateFailed, render
from test_tokenizer import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, QWEN3_TEMPLATE, TALK, THOUGHT
from tokenizer import CHATML

FUNCTION = {"name": "f", "arguments": {"b": "é<", "a": [1, None, True]}}
CALL = [{"role": "user", "content": "<é> & \"q\""},
        {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [{"type": "function", **FUNCTION}]}]
FEATURES = [
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{% continue %}{% endfor %}x",
    "{% for m in messages %}\n  {% generation %}{% set a = m.role %}{{ a }}{% endgeneration %}\n{% endfor %}\n{{ a }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "{{ messages[-1].reasoning_content }} {{ messages[-1].thinking }} {{ messages[0].thinking is defined }}",
    "{{ strftime_now('%Y') }} {{ dict(a=1) }} {{ dict.fromkeys([1]) }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ namespace({'b': 3}).b }}{{ namespace(self=4).self }}",
    "{{ tools is defined }} {{ tools }} {{ documents }} {{ add_generation_prompt }} {{ custom }} {{ missing }}",
    "  {% if true %}\n  {{ messages[0]['content'] | trim | upper }}\n  {% endif %}\n{#- no -#}  end\n"]
REFUSED = ["{{ messages.__class__.__mro__ }}", "{% set ns = namespace() %}{% set ns._a = 1 %}", "{{ namespace(_a=1) }}",
           "{{ messages.append(1) }}", "{{ dict.__class__ }}", "{{ raise_exception('no <roles>') }}", "{% broken",
           "{{ 1 / 0 }}", "{{ undefined() }}", "{% include 'x' %}", "{{ range(10 ** 9) }}",
           "{{ cycler.__init__.__globals__ }}"]


@pytest.mark.parametrize("template", [QWEN3_TEMPLATE, LLAMA3_TEMPLATE, LLAMA2_TEMPLATE, CHATML, *FEATURES, *REFUSED])
@pytest.mark.parametrize("messages", [TALK, THOUGHT, CALL])
def test_equals_transformers(template, messages):
    variables = dict(add_generation_prompt=True, tools=None, documents=None, bos_token="<s>", eos_token="</s>",
                     custom=[1])
    try:
        expected = render_jinja_template([messages], chat_template=template, **variables)[0][0]
    except Exception as error:
        with pytest.raises(TemplateFailed) as caught:
            render(template, messages, **variables)
        assert str(error)[:20] in str(caught.value)
    else:
        assert render(template, messages, **variables) == expected


def test_what_is_no_json_becomes_the_name_of_its_type():
    messages = [{"role": "user", "content": object()}]
    assert render("{{ messages[0].content }} {{ x }}", messages, x={1}) == "<object> <set>"


HARMFUL = {
    "for ever": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end"),
    "one long step": ("{{ 7 ** (10 ** 9) }}", "did not end within 2 s"),
    "memory": ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    "doubling": ("{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
                 "MemoryError|did not end"),
    "output": ("{{ 'abc' * 999999 }}", "made 2999997 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nesting": ("{{" + "(" * 9999 + ")" * 9999 + "}}", "RecursionError"),
}


@pytest.fixture
def impatient(monkeypatch):
    """A process of the test's own, with less time."""
    monkeypatch.setattr(templates, "SECONDS", 2)
    templates.PROCESS.stop()
    yield
    templates.PROCESS.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_templates(name, impatient):
    template, told = HARMFUL[name]
    with pytest.raises(TemplateFailed, match=told) as caught:
        render(template, TALK)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert render("{{ messages | length }}", TALK) == "3"            # by the same process or its successor


@pytest.mark.slow
def test_an_interrupted_request_is_not_answered_later(impatient, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            render(HARMFUL["for ever"][0], TALK)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("second", TALK) == "second"


def test_a_forked_process_has_its_own(tmp_path):
    assert render("parent", TALK) == "parent"
    pid = os.fork()
    if not pid:
        (tmp_path / "child").write_text(render("child", TALK))
        templates.PROCESS.stop()
        os._exit(0)
    assert render("parent again", TALK) == "parent again"
    assert os.waitpid(pid, 0)[1] == 0 and (tmp_path / "child").read_text() == "child"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_ends_with_the_process_that_asks():
    script = ("import os, templates; templates.render('', []); print(templates.PROCESS.process.pid, flush=True); "
              "os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9
    for _ in range(100):
        if not os.path.exists(f"/proc/{int(done.stdout)}"):
            return
        time.sleep(0.1)
    pytest.fail("the process lives on")


def test_neither_torch_nor_transformers_is_imported_for_a_chat():
    script = ("import sys; from tokenizer import Tokenizer; "
              "print(len(Tokenizer.from_dir('checkpoints/demo').render_chat([{'role': 'user', 'content': 'x'}])), "
              "{'torch', 'transformers', 'jinja2'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split(" ", 1)[1] == "set()\n", done
