"""Attributes of modules, classes and objects, replaced and put back as they were."""

import types

import pytest

from entropy_kernels.integrations._patch import Patch, require
from tests.integrations.signatures import parameters, replacements


class Parent:
    def method(self):
        return "parent"

    @staticmethod
    def static():
        return "static"


class Child(Parent):
    pass


def test_what_an_owner_inherits_is_not_left_with_it():
    child = Child()
    patch = Patch((Child, "method", lambda self: "class"), (child, "method", lambda: "object"))
    assert child.method() == "object"
    assert Child().method() == "class"
    patch.undo()
    assert child.method() == "parent"
    assert "method" not in vars(Child)
    assert "method" not in vars(child)


def test_a_static_method_stays_static():
    with Patch((Parent, "static", staticmethod(lambda: "other"))) as patch:
        assert patch.active
        assert Child().static() == "other"
    assert Child().static() == "static"
    assert not patch.active


def test_a_module_and_an_undo_that_would_undo_another():
    module = types.ModuleType("module")
    module.name = 1
    first = Patch((module, "name", 2))
    second = Patch((module, "name", 3))
    with pytest.raises(RuntimeError, match=r"module\.name was replaced again"):
        first.undo()
    second.undo()
    first.undo()
    assert module.name == 1


def test_what_is_not_there_is_an_error_before_anything_is_replaced():
    with pytest.raises(AttributeError, match="missing"):
        Patch((Parent, "static", None), (Parent, "missing", None))
    assert Parent.static() == "static"


def test_versions():
    require("torch", "2.0", "100")
    with pytest.raises(ImportError, match=r"torch>=1,<2, whose internals it patches; got"):
        require("torch", "1", "2")
    with pytest.raises(ImportError, match="not installed"):
        require("no-such-package", "1", "2")


def test_a_transformers_model_takes_what_it_took():
    pytest.importorskip("transformers", reason="the adapter is for transformers")
    from entropy_kernels.integrations.hf import patch_lm_head
    from tests.trainer.small import build_model

    model = build_model("qwen3")
    (_, model_forward, ours), (_, head_forward, head) = replacements(lambda: patch_lm_head(model))
    assert parameters(ours) == parameters(model_forward)
    assert len(parameters(head)) >= len(parameters(head_forward)) == 1
