import numpy as np
import pytest
import yaml

from jaxtransfer.source.card import CardWarning, card_text, read_card, text_of
from jaxtransfer.types import Head, Lineage, Model, Source

CODE = "a: !!python/object/apply:os.system [touch canary]"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"


def card(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def source(head=None, **lineage):
    defaults = {"ref": "owner/name", "digest": "d" * 64, "commit": "c" * 40, "license": "mit"}
    return Source(Model("bert", None, (), {}, head), {}, Lineage(**(defaults | lineage)))


def front_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter(tmp_path):
    text = "---\r\nlicense: apache-2.0\r\nbase_model:\r\n- a/b\r\n- c/d\r\n---\r\n# Title\n---\nlicense: mit\n---\n"
    front = read_card(card(tmp_path, text))
    assert front["license"] == "apache-2.0"
    assert text_of(front["base_model"]) == "a/b, c/d"
    assert read_card(card(tmp_path, "# No front matter\n---\nlicense: mit\n---\n")) == {}
    assert read_card(card(tmp_path, "---\n- a list\n---\n")) == {}
    assert read_card(card(tmp_path, b"---\nlicense: mit\n---\n" + bytes(range(256)) * 1000)) == {"license": "mit"}


@pytest.mark.parametrize(
    "front",
    [
        BOMB,
        "license: [",
        "a: !!python/object/apply:os.system [touch canary]",
        "[" * 5000,
        "license: \x00",
        "d: 2026-13-45",
    ],
    ids=["aliases", "broken", "code", "deep", "control", "date"],
)
def test_bad_front_matter_warns_and_runs_nothing(tmp_path, front, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(CardWarning, match=r"README\.md: front matter not read .*licence unknown") as caught:
        assert read_card(card(tmp_path, f"---\n{front}\n---\n")) == {}
    assert "\n" not in str(caught[0].message)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("value", [None, 3, {}, [], [1], "", "a\x1b[2J", "x" * 1000])
def test_text_of_refuses(value):
    assert text_of(value) is None


def test_card_of_an_export():
    head = Head("sequence-classification", ("negative", "positive"))
    made = source(head, operations=("swap_head(...)",), dropped={"position_ids": "a buffer"}, base_model="old/base")
    text = card_text(made, "mine", "hf", {"accuracy": np.float32(0.875), "interval": (0.85, 0.9)})
    assert front_of(text) == {
        "license": "mit",
        "base_model": "owner/name",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["jaxtransfer", "bert"],
    }
    for part in ("d" * 64, "c" * 40, "swap_head(...)", "position_ids", "| accuracy | 0.875 |", "0.85 to 0.9"):
        assert part in text
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in text


def test_card_without_a_licence_says_so():
    text = card_text(source(license=None, commit=None, ref="folder", base_model="old/base"), "mine", "orbax")
    assert front_of(text)["license"] == "unknown" and front_of(text)["base_model"] == "old/base"
    assert "names no licence" in text and "jaxtransfer.load" in text and "transformers" not in text


def test_nothing_injects_into_the_card():
    made = source(operations=("a\n\n# b <script>|\x1b[2J",), license="mit\n---\nevil: true", base_model=None)
    text = card_text(made, "x\n# y", "hf")
    assert "evil" not in front_of(text)
    assert "\x1b" not in text and "<script>" not in text.replace("\\<", "").replace("\\>", "")
    assert "\n# b" not in text and "\n# y" not in text
