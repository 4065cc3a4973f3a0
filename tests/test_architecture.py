"""The house rules of the code, read from its syntax trees: floors, imports, collectives, environment, config keys.

Every check is a function from sources to lines "file:line: problem"; each is also tried on a source that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. Imports run downward, or along a floor.
FLOORS = (
    {"errors"},
    {"config", "config_checks", "config_file", "config_schema", "mesh", "mixture", "ramp", "spec"},
    {"context", "comm", "rng", "megapoly_kernels"},
    {"layers", "optim", "data", "pipeline"},
    {"models"},
    {"checkpoint"},
    {"backends", "engine"},
    {"generate", "metrics", "watchdog", "stragglers", "profiling", "stability", "validation", "run", "trainer"},
    {"launch", "evaluate", "instruct", "plan", "bench", "charts"},
    {"cli"},
    {"__main__"},
)
STRANGERS = FLOORS[3]  # which do not know each other
WITHOUT_TORCH = (
    "errors",
    "config",
    "mesh",
    "mixture",
    "ramp",
    "spec",
    "pipeline.actions",
    "pipeline.generators",
    "pipeline.schedule",
    "pipeline.timeline",
    "pipeline.comparison",
    "pipeline.picture",
    "optim.layout",
    "optim.scaler",
    "data.curriculum",
    "data.epochs",
    "data.plan",
    "data.plan_document",
    "data.segments",
    "data.templates",
    "instruct.asking",
    "instruct.endpoint",
    "instruct.plan",
    "instruct.report",
    "models.cost",
    "plan.activations",
    "plan.memory",
    "plan.fit",
    "plan.report",
)
READS_ENVIRONMENT = ("megapoly/launch.py", "megapoly/instruct/endpoint.py")  # the latter for an API key
# Optional extras that one file may import inside a function: (file, package).
OPTIONAL_IMPORTS: frozenset[tuple[str, str]] = frozenset(
    {
        ("kernels/megapoly_kernels/aot.py", "triton"),
        ("kernels/megapoly_kernels/aot.py", "triton.backends.compiler"),
        ("kernels/megapoly_kernels/aot.py", "triton.compiler"),
        ("kernels/megapoly_kernels/apex_ops.py", "amp_C"),
        ("kernels/megapoly_kernels/apex_ops.py", "fused_layer_norm_cuda"),
        ("kernels/megapoly_kernels/attention_libraries.py", "flash_attn"),
        ("megapoly/bench/rouge.py", "rouge_score"),
        ("megapoly/checkpoint/verification.py", "transformers"),
        ("megapoly/charts/figure.py", "matplotlib"),
        ("megapoly/data/compression.py", "zstandard"),
        ("megapoly/data/huggingface_tokenizer.py", "tokenizers"),
        ("megapoly/data/huggingface_export.py", "tokenizers"),
        ("megapoly/data/parquet.py", "pyarrow"),
        ("megapoly/evaluate/metrics.py", "lm_eval"),
        ("megapoly/evaluate/metrics.py", "rouge_score"),
        ("megapoly/evaluate/metrics.py", "sacrebleu"),
        ("megapoly/evaluate/records.py", "datasets"),
        ("megapoly/evaluate/records.py", "sacrebleu"),
        ("megapoly/instruct/endpoint.py", "openai"),
        ("megapoly/instruct/rouge.py", "rapidfuzz"),
        ("megapoly/instruct/words.py", "icu4py"),
    }
)
SCHEMAS = ("megapoly.config_schema", "megapoly.instruct.config")
COLLECTIVE = re.compile(
    r"(batch_|monitored_)?(all_reduce|all_gather|reduce|reduce_scatter|broadcast|gather|scatter|all_to_all|barrier"
    r"|i?send|i?recv)(_.*)?"
)


@dataclass(frozen=True)
class Source:
    """A file: path from the root of the repository, dotted module name, syntax tree."""

    path: str
    module: str
    tree: ast.Module

    @property
    def unit(self) -> str:
        """The file or package of the house that it belongs to."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "megapoly" and len(parts) > 1 else parts[0]

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


Sources = dict[str, Source]  # by module name


def parse(files: dict[str, str]) -> Sources:
    sources = {}
    for path, text in files.items():
        module = path.removeprefix("kernels/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        sources[module] = Source(path, module, ast.parse(text, path))
    return sources


@pytest.fixture(scope="module")
def project() -> Sources:
    paths = [path for top in ("megapoly", "kernels/megapoly_kernels") for path in sorted((ROOT / top).rglob("*.py"))]
    return parse({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def imports(source: Source, sources: Sources) -> Iterator[tuple[ast.AST, str]]:
    """Every import with the dotted name of the module it loads, inside functions too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")
                keep = len(package) - node.level + source.path.endswith("__init__.py")
                base = ".".join([*package[:keep], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in sources or base in ("megapoly", "torch") else base


def floor(unit: str) -> int | None:
    return next((i for i, units in enumerate(FLOORS) if unit in units), None)


def check_floors(sources: Sources) -> list[str]:
    problems = []
    for source in sources.values():
        own = -1 if source.module == "megapoly" else floor(source.unit)
        if own is None:
            problems.append(f"{source.path}:1: {source.unit} stands on no floor; give it one in FLOORS")
            continue
        for node, name in imports(source, sources):
            parts = name.split(".")
            if parts[0] not in ("megapoly", "megapoly_kernels"):
                continue
            unit = parts[1] if parts[0] == "megapoly" and len(parts) > 1 else parts[0]
            if unit == source.unit:
                continue
            other = floor(unit)
            upward = other is not None and (other > own or source.unit == "megapoly_kernels")
            if upward or (unit in STRANGERS and source.unit in STRANGERS):
                problems.append(f"{source.at(node)}: {source.unit} imports {name}, which it must not know")
    return problems


def check_cycles(sources: Sources) -> list[str]:
    edges = {
        module: {name: node for node, name in imports(source, sources) if name in sources and name != module}
        for module, source in sources.items()
    }
    problems, finished = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycle = [*path[path.index(module) :], module]
            first = sources[cycle[0]]
            problems.append(f"{first.at(edges[cycle[0]][cycle[1]])}: imports run in a circle: {' -> '.join(cycle)}")
        elif module not in finished:
            for name in edges[module]:
                visit(name, [*path, module])
            finished.add(module)

    for module in sources:
        visit(module, [])
    return problems


def check_local_imports(sources: Sources, optional: frozenset[tuple[str, str]] = OPTIONAL_IMPORTS) -> list[str]:
    problems = []
    for source in sources.values():
        if source.path.startswith("megapoly/cli/"):
            continue
        inside = {
            node
            for function in ast.walk(source.tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for node in ast.walk(function)
        }
        for node, name in imports(source, sources):
            if node in inside and (source.path, name.split(".")[0]) not in optional:
                problems.append(f"{source.at(node)}: import of {name} inside a function")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                problems.append(f"{source.at(node)}: import by a call")
    return problems


def check_without_torch(sources: Sources, modules: tuple[str, ...] = WITHOUT_TORCH) -> list[str]:
    """Follows the imports, and the ``__init__`` files of the packages on the way."""
    problems = []
    for start in (f"megapoly.{module}" for module in modules):
        if start not in sources:
            problems.append(f"{start.replace('.', '/')}.py:1: has to be without torch, but does not exist")
            continue
        seen: set[str] = set()
        todo = [start]
        while todo:
            module = todo.pop()
            if module in seen or module not in sources:
                continue
            seen.add(module)
            parts = module.split(".")
            todo += [".".join(parts[:i]) for i in range(1, len(parts))]
            for node, name in imports(sources[module], sources):
                if name.split(".")[0] in ("torch", "triton", "megapoly_kernels"):
                    problems.append(f"{sources[module].at(node)}: {name} is loaded by {start}, which has no torch")
                todo.append(name)
    return problems


def check_globals(sources: Sources) -> list[str]:
    return [
        f"{source.at(node)}: global {', '.join(node.names)}; pass it in"
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Global)
    ]


def check_environment(sources: Sources) -> list[str]:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    problems = []
    for source in sources.values():
        if source.path in READS_ENVIRONMENT:
            continue
        for node in ast.walk(source.tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
            by_name = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
            if attribute or by_name:
                problems.append(f"{source.at(node)}: environment variables are for {', '.join(READS_ENVIRONMENT)}")
    return problems


def check_collectives(sources: Sources) -> list[str]:
    problems = []
    for source in sources.values():
        if source.path == "megapoly/comm.py" or not source.path.startswith("megapoly/"):
            continue
        aliases = {"torch.distributed"}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                aliases |= {a.asname for a in node.names if a.name == "torch.distributed" and a.asname}
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
        for node in ast.walk(source.tree):
            used: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
                used = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                used = [alias.name for alias in node.names]
            problems += [
                f"{source.at(node)}: {name} of torch.distributed outside comm.py"
                for name in used
                if COLLECTIVE.fullmatch(name)
            ]
    return problems


def config_sections(config: Source) -> dict[str, dict[str, ast.AnnAssign]]:
    """Fields of every section of the schema: class name -> key -> its definition."""
    sections: dict[str, dict[str, ast.AnnAssign]] = {}
    for node in config.tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "_Section" for base in node.bases):
            sections[node.name] = {
                ast.unparse(each.target): each for each in node.body if isinstance(each, ast.AnnAssign)
            }
    return sections


def receivers(tree: ast.AST, usual: dict[str, set[str]]) -> dict[str, set[str]]:
    """Names that hold each section in a file: the usual ones, annotated ones, and those assigned from an attribute."""
    result = {section: set(names) for section, names in usual.items()}

    def note(target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=False):
                note(each, its)
        elif isinstance(value, ast.Attribute):
            for section, names in usual.items():
                if value.attr in names:
                    result[section].add(ast.unparse(target).split(".")[-1].lstrip("_"))

    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None)
        if annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)  # type: ignore[attr-defined]
            for word in re.findall(r"\w+", ast.unparse(annotation)):
                result.get(word, set()).add(name.split(".")[-1].lstrip("_"))
        if isinstance(node, ast.Assign):
            for target in node.targets:
                note(target, node.value)
    return result


def check_config_keys(sources: Sources) -> list[str]:
    """Keys that no code reads. A check is no use of a key, a property of its section is."""
    schemas = [sources[name] for name in SCHEMAS if name in sources]
    return [problem for schema in schemas for problem in _unread_keys(schema, sources)]


def _unread_keys(config: Source, sources: Sources) -> list[str]:
    sections = config_sections(config)
    usual = {section: {section.lower(), "config"} if section == "Schema" else {section.lower()} for section in sections}
    for fields in sections.values():
        for key, field in fields.items():
            usual.get(ast.unparse(field.annotation), set()).add(key)
    read: set[tuple[str, str]] = set()

    def note(tree: ast.AST, holders: dict[str, set[str]]) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = ast.unparse(node.value).split(".")[-1].lstrip("_")
                read.update((section, node.attr) for section, names in holders.items() if holder in names)

    for source in sources.values():
        if source is not config and source.module != "megapoly.config_checks":
            note(source.tree, receivers(source.tree, usual))
    for node in config.tree.body:
        if isinstance(node, ast.ClassDef) and node.name in sections:
            holders = {**usual, node.name: {*usual[node.name], "self"}}
            note(node, holders)
    return [
        f"{config.at(field)}: nothing reads {key} of {section}"
        for section, fields in sections.items()
        for key, field in fields.items()
        if (section, key) not in read and not key.startswith("model_config")
    ]


CHECKS: dict[str, Callable[[Sources], list[str]]] = {
    check.__name__: check
    for check in (
        check_floors,
        check_cycles,
        check_local_imports,
        check_without_torch,
        check_globals,
        check_environment,
        check_collectives,
        check_config_keys,
    )
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_project_keeps_the_rule(check, project):
    assert len(project) > 10
    assert "\n".join(check(project)) == ""


CONFIG = """
class _Section: ...
class Rates(_Section):
    first: float
    second: float
    third: float = 1.0
    @property
    def double(self): return 2 * self.third
class Config(_Section):
    rates: Rates
"""


@pytest.mark.parametrize(
    ("check", "files", "problem"),
    [
        (check_floors, {"megapoly/mesh.py": "\nfrom megapoly.trainer import x"}, "megapoly/mesh.py:2: mesh imports"),
        (check_floors, {"megapoly/mesh.py": "from megapoly import trainer"}, "imports megapoly.trainer"),
        (check_floors, {"megapoly/mesh.py": "from .trainer import x"}, "mesh.py:1: mesh imports megapoly.trainer"),
        (check_floors, {"megapoly/data/plan.py": "from ..models import a"}, "plan.py:1: data imports megapoly.models"),
        (check_floors, {"megapoly/data/plan.py": "import megapoly.optim.layout"}, "data imports megapoly.optim.layout"),
        (check_floors, {"megapoly/__init__.py": "import megapoly.mesh"}, "megapoly imports megapoly.mesh"),
        (check_floors, {"megapoly/attic.py": ""}, "attic.py:1: attic stands on no floor"),
        (
            check_floors,
            {"kernels/megapoly_kernels/norm.py": "def f():\n    from megapoly.errors import E"},
            "kernels/megapoly_kernels/norm.py:2: megapoly_kernels imports megapoly.errors",
        ),
        (
            check_cycles,
            {
                "megapoly/data/a.py": "import os\nfrom megapoly.data import b",
                "megapoly/data/b.py": "from . import c",
                "megapoly/data/c.py": "import megapoly.data.a",
            },
            "megapoly/data/a.py:2: imports run in a circle: "
            "megapoly.data.a -> megapoly.data.b -> megapoly.data.c -> megapoly.data.a",
        ),
        (check_local_imports, {"megapoly/rng.py": "def f():\n  import torch"}, "rng.py:2: import of torch inside"),
        (check_local_imports, {"megapoly/rng.py": "importlib.import_module('x')"}, "rng.py:1: import by a call"),
        (check_globals, {"megapoly/rng.py": "def f():\n  global seed\n  seed = 1"}, "rng.py:2: global seed"),
        (check_environment, {"megapoly/rng.py": "import os\nos.environ['A']"}, "rng.py:2: environment"),
        (check_environment, {"megapoly/rng.py": "import os\nos.getenv('A')"}, "rng.py:2: environment"),
        (check_environment, {"megapoly/rng.py": "from os import environ"}, "rng.py:1: environment"),
        (
            check_collectives,
            {"megapoly/rng.py": "import torch.distributed as dist\ndist.all_gather_into_tensor(a, b)"},
            "rng.py:2: all_gather_into_tensor of torch.distributed outside comm.py",
        ),
        (check_collectives, {"megapoly/rng.py": "import torch\ntorch.distributed.isend(a, 1)"}, "rng.py:2: isend"),
        (
            check_collectives,
            {"megapoly/rng.py": "from torch import distributed as d\nd.barrier()"},
            "rng.py:2: barrier",
        ),
        (check_collectives, {"megapoly/rng.py": "from torch.distributed import broadcast"}, "rng.py:1: broadcast"),
        (
            check_config_keys,
            {"megapoly/config_schema.py": CONFIG, "megapoly/rng.py": "def f(config): config.rates.first; other.second"},
            "megapoly/config_schema.py:5: nothing reads second of Rates",
        ),
    ],
)
def test_the_check_finds_what_breaks_the_rule(check, files, problem):
    problems = check(parse(files))
    assert any(problem in each for each in problems), problems
    assert len(problems) == 1, problems


@pytest.mark.parametrize("reads", ["config.rates.second", "r = config.rates\nr.second", "def f(x: Rates): x.second"])
def test_a_key_is_read_through_its_section(reads):
    files = {"megapoly/config_schema.py": CONFIG, "megapoly/rng.py": f"config.rates.first\n{reads}"}
    assert check_config_keys(parse(files)) == []


def test_torch_is_found_through_other_files():
    files = {
        "megapoly/__init__.py": "",
        "megapoly/pipeline/__init__.py": "\nimport torch",
        "megapoly/pipeline/schedule.py": "from megapoly.spec import Box",
        "megapoly/spec.py": "from torch import Tensor",
    }
    problems = sorted(check_without_torch(parse(files), ("pipeline.schedule", "mesh")))
    assert problems == [
        "megapoly/mesh.py:1: has to be without torch, but does not exist",
        "megapoly/pipeline/__init__.py:2: torch is loaded by megapoly.pipeline.schedule, which has no torch",
        "megapoly/spec.py:1: torch.Tensor is loaded by megapoly.pipeline.schedule, which has no torch",
    ]


def test_what_the_rules_allow():
    files = {
        "megapoly/cli/plan.py": "def main():\n  import torch\n  from megapoly.trainer import x",
        "megapoly/launch.py": "import os\nos.environ['RANK']",
        "megapoly/comm.py": "import torch.distributed as dist\ndist.all_reduce(a)",
        "megapoly/context.py": "import torch.distributed as dist\nfrom megapoly.mesh import Mesh\ndist.new_group([0])",
        "megapoly/data/plan.py": "from megapoly.data.samples import a\nfrom megapoly.comm import b\nqueue.send(c)",
    }
    sources = parse(files)
    for check in (check_floors, check_cycles, check_local_imports, check_globals, check_environment, check_collectives):
        assert check(sources) == []
    extra = parse({"megapoly/checkpoint/huggingface.py": "def f():\n  import transformers.models"})
    assert check_local_imports(extra, frozenset({("megapoly/checkpoint/huggingface.py", "transformers")})) == []
