"""Write docs/api.md from the docstrings of the public API, or check that it is up to date.

The sources are parsed, not imported: no framework is needed.

python scripts/api_docs.py
python scripts/api_docs.py --check
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mooshak.command_line import command_parser
from mooshak.files import write_atomically

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "api.md"
MODULES = (
    "objectives",
    "model",
    "kv_cache",
    "ops/attention",
    "ops/activations",
    "ops/cross_entropy",
    "ops/matmul",
)
"""Files of both packages whose public functions and classes are listed."""

HEAD = """# Python API

Generated from the docstrings by `python scripts/api_docs.py`; do not edit.

`mooshak_torch` and `mooshak_jax` have the same names, arguments and results. Importing a package
imports its framework on first use.

```python
import mooshak_torch

lm = mooshak_torch.load("runs/demo/torch/checkpoints/600")
print(lm.generate("एक समय", max_new_tokens=32))
```
"""


@dataclass(frozen=True)
class Field:
    """An annotated attribute of a class."""

    name: str
    type: str
    default: str
    doc: str


def parse(path: str) -> dict[str, ast.stmt]:
    """Return the public functions and classes of a file by name, in order."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found[node.name] = node
    return found


def methods(node: ast.stmt) -> Iterator[ast.FunctionDef]:
    """Yield the public methods and properties of a class, without overloads."""
    assert isinstance(node, ast.ClassDef)
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
            continue
        if "overload" not in map(ast.unparse, item.decorator_list):
            yield item


def is_property(node: ast.FunctionDef) -> bool:
    """Return whether a method is a property."""
    return "property" in map(ast.unparse, node.decorator_list)


def attributes(node: ast.stmt) -> Iterator[Field]:
    """Yield the annotated attributes of a class, each with the docstring that follows it."""
    assert isinstance(node, ast.ClassDef)
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign):
            continue
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = join_lines(str(following.value.value))
        default = "" if item.value is None else ast.unparse(item.value)
        yield Field(ast.unparse(item.target), ast.unparse(item.annotation), default, doc)


def signature(node: ast.stmt) -> str:
    """Return the call of a function or a class, without `self`."""
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if init:
            return f"{node.name}({arguments(init[0])})"
        fields = ", ".join(f"{field.name}: {field.type}" for field in attributes(node))
        return f"{node.name}({fields})" if node.decorator_list or node.bases else node.name
    assert isinstance(node, ast.FunctionDef)
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{node.name}({arguments(node)}){returns}"


def arguments(node: ast.FunctionDef) -> str:
    """Return the arguments of a function as text, without `self`."""
    return re.sub(r"^self(, )?", "", ast.unparse(node.args))


def documentation(node: ast.stmt) -> str:
    """Return the docstring of a function or a class, dedented."""
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return ast.get_docstring(node) or ""


def summary(node: ast.stmt) -> str:
    """Return the first paragraph of the docstring in one line."""
    return join_lines(documentation(node).split("\n\n")[0])


def join_lines(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


def table(fields: list[Field]) -> str:
    """Return a Markdown table of attributes, with defaults if there are any."""
    has_defaults = any(field.default for field in fields)
    head = ["name", "type", *(["default"] if has_defaults else []), "meaning"]
    rows = [head, ["---"] * len(head)]
    for field in fields:
        default = [f"`{field.default}`" if field.default else ""] if has_defaults else []
        rows.append([f"`{field.name}`", f"`{field.type}`", *default, field.doc])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows)


def interface() -> str:
    """Return the sections of `load`, `LM`, `Completion`, the settings and the errors."""
    shared, settings = parse("mooshak/generation/lm.py"), parse("mooshak/config/generate.py")
    errors, lm = parse("mooshak/errors.py"), shared["LM"]
    completion = parse("mooshak/generation/completion.py")["Completion"]
    parts = ["## load"]
    for framework in ("torch", "jax"):
        load = parse(f"mooshak_{framework}/lm.py")["load"]
        parts += [code(f"mooshak_{framework}.{signature(load)}"), documentation(load)]
    parts += ["## LM", documentation(lm), table(list(attributes(lm)))]
    parts += [f"`{m.name}`: {summary(m)}" for m in methods(lm) if is_property(m)]
    for method in methods(lm):
        if not is_property(method):
            parts += [f"### {method.name}", code(f"lm.{signature(method)}"), documentation(method)]
    for title, node in (
        ("Completion", completion),
        ("Settings", settings["GenerateConfig"]),
    ):
        parts += [f"## {title}", documentation(node), table(list(attributes(node)))]
    parts += ["## Errors", "Both are in `mooshak.errors`."]
    parts += [f"- `{name}`: {summary(errors[name])}" for name in ("InputError", "PeerError")]
    return "\n\n".join(parts)


def modules() -> str:
    """Return the sections of the modules that both packages have."""
    parts = [
        "## Modules",
        "Public functions and classes of the model and its training, by file. A suffix such as "
        "`_BTD` names the axes of an array ([glossary](glossary.md)). Signatures are those of "
        "`mooshak_torch`; those of `mooshak_jax` follow if more than the array types differ.",
    ]
    for module in MODULES:
        torch, jax = (parse(f"mooshak_{framework}/{module}.py") for framework in ("torch", "jax"))
        parts.append(f"### {module}")
        for name in [*torch, *(name for name in jax if name not in torch)]:
            parts.append(entry(torch.get(name), jax.get(name)))
    return "\n\n".join(parts)


def entry(torch: ast.stmt | None, jax: ast.stmt | None) -> str:
    """Return the list item of a name that one or both packages define."""
    node = torch or jax
    assert node is not None
    only = "" if torch and jax else f" ({'torch' if torch else 'JAX'} only)"
    text = f"- `{signature(node)}`{only}  \n  {summary(node)}"
    if torch and jax and neutral(signature(torch)) != neutral(signature(jax)):
        text += f"  \n  JAX: `{signature(jax)}`"
    if isinstance(node, ast.ClassDef):
        for method in methods(node):
            call = method.name if is_property(method) else signature(method)
            text += f"\n  - `.{call}`: {summary(method)}" if summary(method) else ""
    return text


def neutral(call: str) -> str:
    """Return a signature without what always differs: the types of arrays and dtypes."""
    for torch, jax in (("Tensor", "Array"), ("torch.dtype", "jnp.dtype"), ("BT1K", "BT1k")):
        call = call.replace(torch, jax)
    return call


def code(call: str) -> str:
    """Return a signature as a Python block, an argument per line if it is long."""
    if len(call) > 96:
        tree = ast.parse(f"def {call.split('.', 1)[1]}: ...").body[0]
        assert isinstance(tree, ast.FunctionDef)
        head, tail = call.split("(", 1)[0], call.rsplit(")", 1)[1]
        lines = "".join(f"    {part},\n" for part in split_arguments(tree.args))
        call = f"{head}(\n{lines}){tail}"
    # Not "python": those blocks are examples, which a test runs.
    return f"```py\n{call}\n```"


def split_arguments(args: ast.arguments) -> list[str]:
    """Return each argument of a signature, with its annotation and default."""
    defaults = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
    parts = []
    for arg, default in zip(args.args, defaults, strict=True):
        parts.append(ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else ""))
    return parts + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def api_page() -> str:
    """Return the text of docs/api.md."""
    return "\n\n".join([HEAD.rstrip(), interface(), modules()]) + "\n"


def main() -> None:
    parser = command_parser("scripts/api_docs.py", __doc__, "[--check]")
    text = "exit 1 if docs/api.md is not up to date; write nothing"
    parser.add_argument("--check", action="store_true", help=text)
    if not parser.parse_args().check:
        write_atomically(TARGET, api_page())
    elif not TARGET.is_file() or TARGET.read_text("utf-8") != api_page():
        sys.exit("docs/api.md is not up to date; run python scripts/api_docs.py")


if __name__ == "__main__":
    main()
