"""Imports point downward, heavy libraries load late: the rules that keep the package readable and quick to start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*sorted((ROOT / "psd").rglob("*.py")), ROOT / "app.py"]
    if path.exists()
}

# Lowest first. A module imports from lower layers or from its own package, never sideways or upward.
LAYERS = [
    {"psd.presets"},
    {"psd", "psd.errors", "psd.export", "psd.config", "psd.guidance"},
    {"psd.tensors"},
    {"psd.scene", "psd.schedule", "psd.events", "psd.embedding", "psd.sculpted", "psd.picture"},
    {"psd.contracts"},
    {"psd.models"},
    {"psd.methods", "psd.score", "psd.pairs", "psd.distil"},
    {"psd.content"},
    {"psd.safety", "psd.record", "psd.modes", "psd.budget"},
    {"psd.run"},
    {"psd.ui", "psd.__main__", "psd.toybox", "psd.check"},
    {"psd.bench"},
    {"app"},
]
# And inside psd.models.
WING = [{"hub"}, {"weights", "parts"}, {"priors", "rewards"}, {"needs", "checker"}]
LATE = {"torch", "gradio", "diffusers", "transformers"}


def unit(module: str) -> str:
    """The row of LAYERS a module belongs to: psd.models.priors.stable_diffusion -> psd.models."""
    return ".".join(module.split(".")[:2])


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Full names of what `module` imports; `from psd import x` counts as psd.x where that is a module."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = module_level(tree) if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # psd.generate is psd.run's, lazily.
                found.add("psd.run" if full == "psd.generate" else full if full in MODULES else node.module)
    return found


def module_level(tree: ast.AST) -> list[ast.AST]:
    """Statements run by importing: not those inside functions or under `if TYPE_CHECKING`."""
    nodes = []
    for node in ast.iter_child_nodes(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not late and not typing_only:
            nodes += [node, *module_level(node)]
    return nodes


def third_party(names: set[str]) -> set[str]:
    tops = {name.split(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"psd", "app", "__future__"}


def rank(module: str) -> int:
    ranks = [index for index, layer in enumerate(LAYERS) if unit(module) in layer]
    assert ranks, f"{module} has no layer: add it to LAYERS"
    return ranks[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str):
    if module == "psd":
        assert imports("psd", top_level_only=True) == {"os", "sys", "psd.config"}
        return
    for target in imports(module):
        if target.split(".")[0] not in ("psd", "app") or unit(target) == unit(module):
            continue
        assert rank(target) < rank(module), f"{module} imports {target}"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.count(".") > 1 and unit(module) == "psd.models"]
)
def test_inside_models_imports_point_downward(module: str):
    def floor(name: str) -> int:
        return next(i for i, row in enumerate(WING) if name.split(".")[2] in row)

    for target in imports(module):
        if unit(target) == "psd.models" and target.count(".") > 1 and target.split(".")[2] != module.split(".")[2]:
            assert floor(target) < floor(module), f"{module} imports {target}"


def test_no_module_imports_itself_by_any_way_round():
    """Late imports inside functions count too."""
    graph = {module: {target for target in imports(module) if target in MODULES} for module in MODULES}
    graph["psd"] = {"psd.config"}  # `generate` is handed out when it is asked for

    def circle(module: str, way: tuple[str, ...]) -> tuple[str, ...]:
        if module in way:
            return (*way[way.index(module) :], module)
        if module in done:
            return ()
        found = next(filter(None, (circle(target, (*way, module)) for target in graph[module])), ())
        done.add(module)
        return found

    done: set[str] = set()
    assert [found for module in graph if (found := circle(module, ()))] == []


def test_guidance_imports_torch_alone():
    """And the shapes of its annotations."""
    assert third_party(imports("psd.guidance")) == {"torch", "jaxtyping"}
    assert not {name for name in imports("psd.guidance") if name.startswith("psd")}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_ui_imports_gradio(module: str):
    if unit(module) not in ("app", "psd.ui"):
        assert not third_party(imports(module)) & {"gradio", "gradio_client", "spaces"}


def test_shapes_in_annotations_are_checked_here():
    """The pytest option that makes every annotated contract run: without it these shapes would broadcast."""
    import torch
    from jaxtyping import TypeCheckError

    from psd.guidance import cfg

    with pytest.raises(TypeCheckError):
        cfg(torch.zeros(2), torch.zeros(1), 7.5)


# What each import may cost: `psd.models.priors` and `psd.models.rewards` are tables until a loader is called.
@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("psd", LATE),
        ("psd.__main__", LATE),
        ("psd.safety", LATE),
        ("psd.content", LATE),
        ("psd.embedding", LATE),
        ("psd.sculpted", LATE),
        ("psd.models.priors", LATE),
        ("psd.models.rewards", LATE),
        ("psd.events", LATE | {"numpy"}),
        ("psd.config", LATE | {"numpy"}),
        ("psd.guidance", LATE - {"torch"}),
        ("psd.methods", LATE),
        ("psd.methods.preference", LATE - {"torch"}),
        ("psd.modes.image", LATE - {"torch"}),
        ("psd.schedule", LATE - {"torch"}),
        ("psd.models.checker", LATE - {"torch"}),
        ("psd.run", LATE - {"torch"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(module: str, late: set[str]):
    code = f"import sys, {module}; print(*{sorted(late)!r} and set({sorted(late)!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
